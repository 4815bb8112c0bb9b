// Min-max groups (plugins/layouts/minmax.h) of a block of tokens in vectors, with the same bytes.
//
// 2-bit codes need no division. code = round((x - zero) / scale) passes 1 where the quotient is
// above 0.5, 2 from 1.5 on, 3 above 2.5 (ties to even). Scale has 11 bits at most, so its products
// with these are exact, and a rounded quotient falls on the same side as x - zero falls on of the
// product: the next float beside a product p differs by more than 2^-24 p, and the quotient rounds
// to the tie only from nearer than that.
//
// Include from a file that goes through hwy/foreach_target.h.

#ifndef SIKV_KERNELS_COMMON_SIMD_MINMAX_H_
#define SIKV_KERNELS_COMMON_SIMD_MINMAX_H_

#include <stddef.h>
#include <stdint.h>

#include "kernels/common/simd_tokens.h"
#include "plugins/layouts/minmax.h"

namespace sikv {

// How a row [D] is quantised.
struct MinMaxFormat {
  static constexpr size_t kMaxGroups = kMaxHeadDim / 16;

  size_t head_dim;
  int bits;             // 2, 3, 4 or 8
  size_t group;         // channels, a multiple of 16
  int32_t scale_dtype;  // fp16, fp8_e4m3 or fp8_e5m2

  size_t groups() const { return head_dim / group; }
  size_t code_bytes() const { return head_dim * static_cast<size_t>(bits) / 8; }
  size_t scale_bytes() const {
    return 2 * groups() * static_cast<size_t>(sikv_dtype_bytes(scale_dtype));
  }
};

// Of each group of a block of tokens, [tokens, D / group].
struct alignas(64) MinMaxGroups {
  static constexpr size_t kCount = kBlockTokens * MinMaxFormat::kMaxGroups;
  float low[kCount], high[kCount];
  float scale[kCount], zero[kCount];  // as stored
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_MINMAX_H_

#if defined(SIKV_KERNELS_COMMON_SIMD_MINMAX_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_MINMAX_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_MINMAX_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_MINMAX_TARGET_
#endif

#include <string.h>

#include <limits>

#include "hwy/highway.h"
#include "kernels/common/simd_pack.h"

#if HWY_TARGET != HWY_SCALAR

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

// ---- scales and zeros ---------------------------------------------------------------------------

// low and high of every group of x [count, D].
HWY_INLINE void FindExtremes(const MinMaxFormat& format, const float* HWY_RESTRICT x, int count,
                             MinMaxGroups* groups) {
  const DF d;
  const size_t n = static_cast<size_t>(count) * format.groups();
  for (size_t j = 0; j < n; ++j) {
    const float* from = x + j * format.group;
    VF low = hn::LoadU(d, from), high = low;
    for (size_t i = kLanes; i < format.group; i += kLanes) {
      const VF v = hn::LoadU(d, from + i);
      low = hn::Min(low, v);
      high = hn::Max(high, v);
    }
    groups->low[j] = hn::GetLane(hn::MinOfLanes(d, low));
    groups->high[j] = hn::GetLane(hn::MaxOfLanes(d, high));
  }
}

// minmax::store_range of n groups: pairs of the scale type to `scales`.
template <typename Narrow>
HWY_INLINE void StoreRanges(const MinMaxFormat& format, size_t n, MinMaxGroups* groups,
                            uint8_t* scales) {
  using Pair = hwy::UnsignedFromSize<2 * sizeof(uint8_t) * Narrow::kBits / 8>;
  const DF d;
  const hn::Rebind<Pair, DF> dp;
  const VF top = hn::Set(d, static_cast<float>((1 << format.bits) - 1));
  const float largest = minmax::largest_finite(format.scale_dtype);
  alignas(64) Pair pairs[MinMaxGroups::kCount];
  for (size_t j = 0; j < n; j += kLanes) {
    const VF low = hn::Load(d, groups->low + j), high = hn::Load(d, groups->high + j);
    const VU scale = NarrowSaturated<Narrow::kExpBits, Narrow::kManBits>(
        hn::Add(hn::Div(hn::Sub(high, low), top), hn::Zero(d)), largest);
    const VU zero =
        NarrowSaturated<Narrow::kExpBits, Narrow::kManBits>(hn::Add(low, hn::Zero(d)), largest);
    hn::Store(Widen<Narrow::kExpBits, Narrow::kManBits>(scale), d, groups->scale + j);
    hn::Store(Widen<Narrow::kExpBits, Narrow::kManBits>(zero), d, groups->zero + j);
    const VU pair = hn::Or(scale, hn::ShiftLeft<Narrow::kBits>(zero));
    if constexpr (sizeof(Pair) == 4) {
      hn::Store(pair, dp, pairs + j);
    } else {
      hn::Store(hn::TruncateTo(dp, pair), dp, pairs + j);
    }
  }
  memcpy(scales, pairs, n * sizeof(Pair));
}

// Scales and zeros of one token's groups.
template <typename Narrow>
HWY_INLINE void LoadRanges(size_t n, const uint8_t* scales, float* scale, float* zero) {
  using Pair = hwy::UnsignedFromSize<2 * sizeof(uint8_t) * Narrow::kBits / 8>;
  const DF d;
  const hn::Rebind<Pair, DF> dp;
  alignas(64) Pair pairs[MinMaxFormat::kMaxGroups] = {};
  memcpy(pairs, scales, n * sizeof(Pair));
  for (size_t j = 0; j < n; j += kLanes) {
    VU pair;
    if constexpr (sizeof(Pair) == 4) {
      pair = hn::Load(dp, pairs + j);
    } else {
      pair = hn::PromoteTo(DU(), hn::Load(dp, pairs + j));
    }
    hn::Store(Widen<Narrow::kExpBits, Narrow::kManBits>(pair), d, scale + j);
    hn::Store(Widen<Narrow::kExpBits, Narrow::kManBits>(hn::ShiftRight<Narrow::kBits>(pair)), d,
              zero + j);
  }
}

// ---- codes --------------------------------------------------------------------------------------

// Codes of x [D], a token whose groups have these scales and zeros, to `row`.
HWY_INLINE void StoreCodes2(const MinMaxFormat& format, const float* HWY_RESTRICT x,
                            const float* scales, const float* zeros, uint8_t* row) {
  const DF d;
  for (size_t first = 0; first < format.head_dim; first += kUnit, row += 8) {
    uint32_t passed[3] = {}, planes[2];
    for (size_t i = 0; i < kUnit; i += kLanes) {
      const size_t g = (first + i) / format.group;
      const VF offset = hn::Sub(hn::LoadU(d, x + first + i), hn::Set(d, zeros[g]));
      // A scale of 0 gives code 0.
      const float scale = scales[g] == 0.0f ? std::numeric_limits<float>::infinity() : scales[g];
      passed[0] |= MaskBits(hn::Gt(offset, hn::Set(d, 0.5f * scale))) << i;
      passed[1] |= MaskBits(hn::Ge(offset, hn::Set(d, 1.5f * scale))) << i;
      passed[2] |= MaskBits(hn::Gt(offset, hn::Set(d, 2.5f * scale))) << i;
    }
    CountThresholds<2>(passed, planes);
    StorePlanes<2>(planes, row);
  }
}

template <int kBits>
HWY_INLINE void StoreCodes(const MinMaxFormat& format, const float* HWY_RESTRICT x,
                           const float* scales, const float* zeros, uint8_t* row) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  const VF top = hn::Set(d, static_cast<float>((1 << kBits) - 1));
  for (size_t first = 0; first < format.head_dim; first += kUnit, row += kUnit / 8 * kBits) {
    uint32_t planes[kBits] = {};
    for (size_t i = 0; i < kUnit; i += kLanes) {
      const size_t g = (first + i) / format.group;
      const VF scale = hn::Set(d, scales[g]), zero = hn::Set(d, zeros[g]);
      const VF position = hn::Div(hn::Sub(hn::LoadU(d, x + first + i), zero), scale);
      const VF clamped = hn::Min(hn::Max(position, hn::Zero(d)), top);
      const auto code = hn::NearestInt(hn::IfThenZeroElse(hn::Eq(scale, hn::Zero(d)), clamped));
      if constexpr (kBits == 8) {
        hn::StoreU(hn::DemoteTo(d8, code), d8, row + i);
      } else {
        for (int k = 0; k < kBits; ++k) {
          planes[k] |= MaskBits(hn::RebindMask(d, hn::TestBit(code, hn::Set(di, 1 << k)))) << i;
        }
      }
    }
    if constexpr (kBits != 8) StorePlanes<kBits>(planes, row);
  }
}

// Codes of kLanes channels from channel i on.
template <int kBits>
HWY_INLINE VF LoadCodes(const uint8_t* row, size_t i) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  if constexpr (kBits == 8) {
    return hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(hn::Rebind<uint8_t, DF>(), row + i)));
  } else {
    const VU codes = hn::And(UnpackCodes<kBits>(row, i), hn::Set(DU(), (1u << kBits) - 1u));
    return hn::ConvertTo(d, hn::BitCast(di, codes));
  }
}

template <int kBits>
HWY_INLINE void LoadGroups(const MinMaxFormat& format, const uint8_t* row, const float* scales,
                           const float* zeros, float* x) {
  const DF d;
  for (size_t g = 0, i = 0; i < format.head_dim; ++g) {
    const VF scale = hn::Set(d, scales[g]), zero = hn::Set(d, zeros[g]);
    for (const size_t end = i + format.group; i < end; i += kLanes) {
      hn::StoreU(hn::Add(hn::Mul(LoadCodes<kBits>(row, i), scale), zero), d, x + i);
    }
  }
}

// ---- rows ---------------------------------------------------------------------------------------

// minmax::pack_row of x [count, D], tokens that follow each other in both planes.
inline void PackMinMax(const MinMaxFormat& format, const float* x, int count, uint8_t* codes,
                       uint8_t* scales, MinMaxGroups* groups) {
  FindExtremes(format, x, count, groups);
  WithNarrowType(format.scale_dtype, [&](auto narrow) HWY_ATTR {
    StoreRanges<decltype(narrow)>(format, static_cast<size_t>(count) * format.groups(), groups,
                                  scales);
  });
  for (int t = 0; t < count; ++t, x += format.head_dim, codes += format.code_bytes()) {
    const float* scale = groups->scale + static_cast<size_t>(t) * format.groups();
    const float* zero = groups->zero + static_cast<size_t>(t) * format.groups();
    switch (format.bits) {
      case 2:
        StoreCodes2(format, x, scale, zero, codes);
        break;
      case 3:
        StoreCodes<3>(format, x, scale, zero, codes);
        break;
      case 4:
        StoreCodes<4>(format, x, scale, zero, codes);
        break;
      default:
        StoreCodes<8>(format, x, scale, zero, codes);
        break;
    }
  }
}

// minmax::unpack_row: x [D] of one token.
inline void UnpackMinMax(const MinMaxFormat& format, const uint8_t* codes, const uint8_t* scales,
                         float* x) {
  alignas(64) float scale[MinMaxFormat::kMaxGroups], zero[MinMaxFormat::kMaxGroups];
  WithNarrowType(format.scale_dtype, [&](auto narrow) HWY_ATTR {
    LoadRanges<decltype(narrow)>(format.groups(), scales, scale, zero);
  });
  switch (format.bits) {
    case 2:
      return LoadGroups<2>(format, codes, scale, zero, x);
    case 3:
      return LoadGroups<3>(format, codes, scale, zero, x);
    case 4:
      return LoadGroups<4>(format, codes, scale, zero, x);
    default:
      return LoadGroups<8>(format, codes, scale, zero, x);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET != HWY_SCALAR
#endif  // SIKV_KERNELS_COMMON_SIMD_MINMAX_TARGET_
