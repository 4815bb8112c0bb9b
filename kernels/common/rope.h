// Rotary positions, for methods that compare keys or queries without them.
//
// A position p turns pair i of a vector by p * theta^(-2i / D). What is a pair depends on the model.
#ifndef SIKV_KERNELS_COMMON_ROPE_H_
#define SIKV_KERNELS_COMMON_ROPE_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "plugins/sdk/plugin.h"

namespace sikv {

enum class Rope { kKept, kHalf, kInterleaved };  // numbers that saap's files hold

inline constexpr sikv_option_spec kRopeOption = choice_option(
    "rope", "half", "half|interleaved|kept",
    "how positions turn channels: i with i + D / 2 or neighbours, to undo it; kept: not "
    "undone");

// As the option says. Refused where the base is not known.
inline Rope rope_of(const CreateArgs& args) {
  const std::string_view rope = args.options.choice("rope");
  if (rope == "kept") return Rope::kKept;
  if (args.shape.rope_theta <= 0) {
    throw Refused("rope cannot be undone where its base is unknown; choose `rope: kept`");
  }
  return rope == "half" ? Rope::kHalf : Rope::kInterleaved;
}

// [D / 2] radians per position; zeros where nothing is undone.
inline std::vector<double> rope_frequencies(int dim, double theta, Rope rope) {
  std::vector<double> frequencies(static_cast<size_t>(dim / 2), 0.0);
  if (rope == Rope::kKept) return frequencies;
  for (int i = 0; i < dim / 2; ++i) {
    frequencies[static_cast<size_t>(i)] = std::pow(theta, -2.0 * i / dim);
  }
  return frequencies;
}

// Turns pair i of x [D] by c + i s.
template <typename T>
void turn_pair(T* x, int dim, Rope rope, int i, T c, T s) {
  T& a = x[rope == Rope::kInterleaved ? 2 * i : i];
  T& b = x[rope == Rope::kInterleaved ? 2 * i + 1 : i + dim / 2];
  const T before = a;
  a = c * before - s * b;
  b = c * b + s * before;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_ROPE_H_
