// Unit normals from a seed, the same bits with every compiler and C library: signs of projections on
// them are stored. IEEE 754 fixes + - * / and sqrt, of which log and cos here are made, and the tree
// is built with -ffp-contract=off, so that none of them is fused with another.
#ifndef SIKV_KERNELS_COMMON_GAUSSIAN_DIRECTIONS_H_
#define SIKV_KERNELS_COMMON_GAUSSIAN_DIRECTIONS_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "plugins/abi/sikv_log.h"
#include "plugins/layouts/rotation.h"

namespace sikv {

// cos(2 pi u), 0 <= u <= 1: a sine or cosine of at most pi / 4, by its series to the power of 17.
inline double ieee_cos_turns(double u) {
  const int octant = static_cast<int>(u * 8);
  const int quarter = (octant + 1) / 2;  // the nearest one
  const double x = (u - quarter * 0.25) * 6.28318530717958647693, x2 = x * x;
  const bool is_sine = quarter % 2 != 0;
  double series = 1;
  for (int k = is_sine ? 17 : 16; k >= 2; k -= 2) series = 1 - series * x2 / (k * (k - 1));
  const double value = is_sine ? x * series : series;
  return quarter == 1 || quarter == 2 ? -value : value;
}

// By Box and Muller.
inline std::vector<float> gaussian_directions(uint64_t seed, int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  uint64_t state = seed;
  const auto uniform = [&] {
    state = rotation::splitmix64(state);
    return (static_cast<double>(state >> 11) + 0.5) * 0x1p-53;
  };
  for (float& x : out) {
    const double radius = std::sqrt(-2.0 * sikv_log(uniform()));
    x = static_cast<float>(radius * ieee_cos_turns(uniform()));
  }
  return out;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_GAUSSIAN_DIRECTIONS_H_
