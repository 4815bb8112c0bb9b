// Refuses rows a codec cannot take, with the place where the fault is.
#ifndef SIKV_PLUGINS_SDK_FINITE_H_
#define SIKV_PLUGINS_SDK_FINITE_H_

#include <string>

#include "plugins/abi/sikv_dtype.h"
#include "plugins/abi/sikv_limits.h"
#include "plugins/sdk/error.h"

namespace sikv {

struct RowPlace {
  int layer;
  int sequence;
  int num_sequences;
  int head;
  int position;
};

inline bool is_storable(float x) { return x >= -SIKV_LARGEST_ELEMENT && x <= SIKV_LARGEST_ELEMENT; }

// The sentence for a row [n] of `what` (K, V or Q) that holds a number is_storable denies.
[[noreturn]] inline void refuse_row(const float* row, int n, const char* what,
                                    const RowPlace& place) {
  int d = 0;
  while (d < n && is_storable(row[d])) ++d;
  const float x = row[d];
  std::string text = std::string(what) + " is " + (x != x ? "NaN" : std::to_string(x)) +
                     " at layer " + std::to_string(place.layer) + ", head " +
                     std::to_string(place.head) + ", position " + std::to_string(place.position);
  if (place.num_sequences > 1) text += ", sequence " + std::to_string(place.sequence);
  throw Refused(text + ", channel " + std::to_string(d) +
                ": a cache takes finite numbers up to 2^58");
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_FINITE_H_
