// Pieces of rot_lm's rotation (plugins/layouts/rotation.h) in vectors; simd_rotate_rows.h has the
// whole.
//
// Include from a file that goes through hwy/foreach_target.h.

#ifndef SIKV_KERNELS_COMMON_SIMD_ROTATE_H_
#define SIKV_KERNELS_COMMON_SIMD_ROTATE_H_

#include <array>

#include "plugins/layouts/rotation.h"

namespace sikv {

// 1300 integer operations per row of 128 channels if they were made anew each time.
alignas(64) inline constexpr std::array<float, kMaxHeadDim> kRotationSigns = [] {
  std::array<float, kMaxHeadDim> signs{};
  for (int d = 0; d < kMaxHeadDim; ++d) signs[static_cast<size_t>(d)] = rotation::sign(d);
  return signs;
}();

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_ROTATE_H_

#if defined(SIKV_KERNELS_COMMON_SIMD_ROTATE_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_ROTATE_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_ROTATE_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_ROTATE_TARGET_
#endif

#include "kernels/common/simd_rows.h"

#if HWY_TARGET != HWY_SCALAR

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

// Lanes i and i ^ kHalf change places.
template <size_t kHalf>
HWY_INLINE VF SwapLanes(VF v) {
  if constexpr (kHalf == 1) {
    return hn::Shuffle2301(v);
  } else if constexpr (kHalf == 2) {
    return hn::Shuffle1032(v);
  } else if constexpr (2 * kHalf == kLanes) {
    return hn::ConcatLowerUpper(DF(), v, v);
  } else {
    return hn::SwapAdjacentBlocks(v);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET != HWY_SCALAR
#endif  // SIKV_KERNELS_COMMON_SIMD_ROTATE_TARGET_
