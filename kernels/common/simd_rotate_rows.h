// The rotation of many rows: simd_rotate.h with the butterflies in registers. A row of 128 channels
// goes through memory once with AVX-512 and twice with AVX2 instead of nine times, which is worth a
// third of an encoder's time.
//
// Include from a file that goes through hwy/foreach_target.h.

#if defined(SIKV_KERNELS_COMMON_SIMD_ROTATE_ROWS_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_ROTATE_ROWS_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_ROTATE_ROWS_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_ROTATE_ROWS_TARGET_
#endif

#include "kernels/common/simd_rotate.h"

#if HWY_TARGET != HWY_SCALAR

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

// Butterflies at distance kHalf up to kLanes / 2.
template <size_t kHalf = 1>
HWY_INLINE VF ButterflyWithin(VF v) {
  if constexpr (kHalf == kLanes) {
    return v;
  } else {
    const DU du;
    const auto upper = hn::TestBit(hn::Iota(du, 0), hn::Set(du, uint32_t{kHalf}));
    const VF other = SwapLanes<kHalf>(v);
    return ButterflyWithin<2 * kHalf>(
        hn::IfThenElse(hn::RebindMask(DF(), upper), hn::Sub(other, v), hn::Add(v, other)));
  }
}

HWY_INLINE void Butterfly(VF& lower, VF& upper) {
  const VF sum = hn::Add(lower, upper);
  upper = hn::Sub(lower, upper);
  lower = sum;
}

// x [kDim] <- R x, or R^T x.
template <size_t kDim, bool kInverse>
HWY_INLINE void RotateRow(float* HWY_RESTRICT x) {
  // Vectors at a time: half of the registers.
  constexpr size_t kBlock = rotation::block(kDim);
  constexpr size_t kVectors = HWY_MIN(kBlock / kLanes, size_t{kLanes == 16 ? 16 : 8});
  constexpr size_t kChunk = kVectors * kLanes;
  const DF d;
  const VF norm = hn::Set(d, rotation::norm(kBlock));
  const auto signs = [](size_t i) HWY_ATTR { return hn::Load(DF(), kRotationSigns.data() + i); };
  const auto store = [&](VF v, size_t i) HWY_ATTR {
    v = hn::Mul(v, norm);
    hn::StoreU(kInverse ? hn::Mul(v, signs(i)) : v, d, x + i);
  };
  for (size_t first = 0; first < kDim; first += kChunk) {
    VF v[kVectors];
    for (size_t k = 0; k < kVectors; ++k) {
      const size_t i = first + k * kLanes;
      const VF loaded = hn::LoadU(d, x + i);
      v[k] = ButterflyWithin(kInverse ? loaded : hn::Mul(loaded, signs(i)));
    }
    for (size_t half = 1; half < kVectors; half *= 2) {
      for (size_t k = 0; k < kVectors; ++k) {
        if ((k & half) == 0) Butterfly(v[k], v[k + half]);
      }
    }
    for (size_t k = 0; k < kVectors; ++k) {
      const size_t i = first + k * kLanes;
      if constexpr (kChunk == kBlock) {
        store(v[k], i);
      } else {
        hn::StoreU(v[k], d, x + i);
      }
    }
  }
  for (size_t half = kChunk; half < kBlock; half *= 2) {
    for (size_t first = 0; first < kDim; first += 2 * half) {
      for (size_t i = first; i < first + half; i += kLanes) {
        VF lower = hn::LoadU(d, x + i), upper = hn::LoadU(d, x + i + half);
        Butterfly(lower, upper);
        if (2 * half == kBlock) {
          store(lower, i);
          store(upper, i + half);
        } else {
          hn::StoreU(lower, d, x + i);
          hn::StoreU(upper, d, x + i + half);
        }
      }
    }
  }
}

// x [count, D] <- R x, or R^T x, row by row.
template <bool kInverse>
HWY_INLINE void RotateRows(size_t head_dim, int count, float* x) {
  const auto rows = [&]<size_t kDim>() HWY_ATTR {
    for (int t = 0; t < count; ++t) RotateRow<kDim, kInverse>(x + static_cast<size_t>(t) * kDim);
  };
  switch (head_dim) {
    case 64:
      return rows.template operator()<64>();
    case 96:
      return rows.template operator()<96>();
    case 128:
      return rows.template operator()<128>();
    default:
      return rows.template operator()<256>();
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET != HWY_SCALAR
#endif  // SIKV_KERNELS_COMMON_SIMD_ROTATE_ROWS_TARGET_
