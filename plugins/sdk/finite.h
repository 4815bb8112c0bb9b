// Refuses rows a codec cannot take, with the place where the fault is.
#ifndef SIKV_PLUGINS_SDK_FINITE_H_
#define SIKV_PLUGINS_SDK_FINITE_H_

#include <string>

#include "plugins/abi/sikv_dtype.h"
#include "plugins/sdk/error.h"

namespace sikv {

// Rows reach codecs in the input type; fp32 and bf16 hold numbers whose squares they cannot. Up to
// 2^58 the sum of 256 squared differences stays below fp32's largest, so what passes here never
// becomes inf or NaN later on.
inline constexpr float kLargestElement = 288230376151711744.0f;

struct RowPlace {
  int layer;
  int sequence;
  int num_sequences;
  int head;
  int position;
};

// row [n] of `what` (K, V or Q).
inline void check_finite(const float* row, int n, const char* what, const RowPlace& place) {
  constexpr uint32_t kAbs = 0x7fffffffu;
  bool good = true;
  for (int d = 0; d < n; ++d) {
    good &= (sikv_float_bits(row[d]) & kAbs) <= sikv_float_bits(kLargestElement);
  }
  if (good) return;
  int d = 0;
  while ((sikv_float_bits(row[d]) & kAbs) <= sikv_float_bits(kLargestElement)) ++d;
  const uint32_t bits = sikv_float_bits(row[d]) & kAbs;
  const std::string value = bits > 0x7f800000u    ? "NaN"
                            : bits == 0x7f800000u ? "infinite"
                                                  : std::to_string(row[d]);
  std::string text = std::string(what) + " is " + value + " at layer " +
                     std::to_string(place.layer) + ", head " + std::to_string(place.head) +
                     ", position " + std::to_string(place.position);
  if (place.num_sequences > 1) text += ", sequence " + std::to_string(place.sequence);
  text += ", channel " + std::to_string(d) + ": ";
  text += bits >= 0x7f800000u ? "caches take finite numbers only"
                              : "caches take numbers up to 2^58, whose squares fp32 can sum";
  throw Refused(text);
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_FINITE_H_
