// The rotation of rot_lm (plugins/layouts/rotation.h) in vectors, with the same bits: every
// butterfly adds and subtracts the same pairs in the same order.
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

template <size_t kHalf>
HWY_INLINE void ButterflyLanes(size_t head_dim, float* HWY_RESTRICT x) {
  if constexpr (kHalf < kLanes) {
    const DF d;
    const DU du;
    const auto upper =
        hn::RebindMask(d, hn::TestBit(hn::Iota(du, 0), hn::Set(du, uint32_t{kHalf})));
    for (size_t i = 0; i < head_dim; i += kLanes) {
      const VF v = hn::LoadU(d, x + i), other = SwapLanes<kHalf>(v);
      hn::StoreU(hn::IfThenElse(upper, hn::Sub(other, v), hn::Add(v, other)), d, x + i);
    }
    ButterflyLanes<2 * kHalf>(head_dim, x);
  }
}

// x [D] <- blockdiag(H_b) x.
inline void Hadamard(size_t head_dim, float* HWY_RESTRICT x) {
  const DF d;
  const int block = rotation::block(static_cast<int>(head_dim));
  ButterflyLanes<1>(head_dim, x);
  for (size_t half = kLanes; half < static_cast<size_t>(block); half *= 2) {
    for (size_t first = 0; first < head_dim; first += 2 * half) {
      for (size_t i = first; i < first + half; i += kLanes) {
        const VF lower = hn::LoadU(d, x + i), upper = hn::LoadU(d, x + i + half);
        hn::StoreU(hn::Add(lower, upper), d, x + i);
        hn::StoreU(hn::Sub(lower, upper), d, x + i + half);
      }
    }
  }
  const VF norm = hn::Set(d, rotation::norm(block));
  for (size_t i = 0; i < head_dim; i += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, x + i), norm), d, x + i);
  }
}

// x [D] <- x * signs.
HWY_INLINE void FlipChannels(size_t head_dim, float* HWY_RESTRICT x) {
  const DF d;
  for (size_t i = 0; i < head_dim; i += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::Load(d, kRotationSigns.data() + i)), d, x + i);
  }
}

// x [D] <- R x.
inline void RotateForward(size_t head_dim, float* x) {
  FlipChannels(head_dim, x);
  Hadamard(head_dim, x);
}

// x [D] <- R^T x.
inline void RotateInverse(size_t head_dim, float* x) {
  Hadamard(head_dim, x);
  FlipChannels(head_dim, x);
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET != HWY_SCALAR
#endif  // SIKV_KERNELS_COMMON_SIMD_ROTATE_TARGET_
