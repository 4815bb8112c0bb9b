// Codes and scales of encoded tokens in vectors, with the bytes of plugins/layouts: bit streams
// (bitpack.h), tiles of the index plane (nibble_tile.h), narrow floats (plugins/abi/sikv_dtype.h).
//
// Codes are made as bit planes, one bit per channel and plane, which is what a vector comparison
// gives: bit k of a code is the parity of the thresholds k', 2k', 3k' ... that were passed, k' =
// 2^k.
//
// Include from a file that goes through hwy/foreach_target.h.

#ifndef SIKV_KERNELS_COMMON_SIMD_PACK_H_
#define SIKV_KERNELS_COMMON_SIMD_PACK_H_

#include <stddef.h>
#include <stdint.h>

#include <array>

#include "plugins/abi/sikv_dtype.h"

namespace sikv {

// Bit i of a byte to bit kStep * i.
template <int kStep>
inline constexpr std::array<uint32_t, 256> kSpreadByte = [] {
  std::array<uint32_t, 256> spread{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (int i = 0; i < 8; ++i) spread[byte] |= (byte >> i & 1u) << (kStep * i);
  }
  return spread;
}();

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_PACK_H_

#if defined(SIKV_KERNELS_COMMON_SIMD_PACK_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_PACK_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_PACK_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_PACK_TARGET_
#endif

#include <string.h>

#include "hwy/highway.h"
#include "kernels/common/simd_rows.h"
#include "kernels/common/simd_tokens.h"

#if HWY_TARGET != HWY_SCALAR

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

// ---- bit streams --------------------------------------------------------------------------------

// Bit i of `bits` to bit kStep * i, for the 64 / kStep lowest.
template <int kStep>
HWY_INLINE uint64_t Spread(uint32_t bits) {
  if constexpr (kStep == 1) {
    return bits;
  } else {
#if SIKV_X86_AVX2
    constexpr uint64_t kMask = kStep == 2   ? 0x5555555555555555u
                               : kStep == 3 ? 0x1249249249249249u
                                            : 0x1111111111111111u;
    return _pdep_u64(bits, kMask);
#else
    uint64_t spread = 0;
    for (int i = 0; 8 * kStep * i < 64; ++i) {
      spread |= uint64_t{kSpreadByte<kStep>[bits >> (8 * i) & 255u]} << (8 * kStep * i);
    }
    return spread;
#endif
  }
}

// Planes of the codes of kUnit channels -> their part of the token's bit stream, 4 * kBits bytes.
template <int kBits>
HWY_INLINE void StorePlanes(const uint32_t* planes, uint8_t* to) {
  // Channels of one store: as many as fit 8 bytes, but whole bytes of them.
  constexpr int kChannels = kBits <= 2 ? 32 : 16;
  constexpr size_t kBytes = kChannels * kBits / 8;
  for (int i = 0; i < kUnit; i += kChannels, to += kBytes) {
    uint64_t stream = 0;
    for (int k = 0; k < kBits; ++k) {
      uint32_t bits = planes[k] >> i;
      if constexpr (kChannels == 16) bits &= 0xffffu;
      stream |= Spread<kBits>(bits) << k;
    }
    memcpy(to, &stream, kBytes);
  }
}

// Planes [kBits] of the codes of kUnit channels from the thresholds they passed [2^kBits - 1].
template <int kBits>
HWY_INLINE void CountThresholds(const uint32_t* passed, uint32_t* planes) {
  for (int k = 0; k < kBits; ++k) {
    planes[k] = 0;
    for (int i = 1 << k; i < 1 << kBits; i += 1 << k) planes[k] ^= passed[i - 1];
  }
}

// ---- the index plane ----------------------------------------------------------------------------

// Nibbles of `count` <= 8 tokens, from token `first` of a tile on; the others keep theirs.
HWY_INLINE void StoreTileSigns(const ChannelBits* signs, int first, int count, size_t head_dim,
                               uint8_t* tile) {
  const hn::FixedTag<uint32_t, HWY_MIN(kLanes, 8)> d;
  const size_t lanes = hn::Lanes(d);
  const uint32_t all = count == nibble_tile::kTileTokens ? ~0u : (1u << (4 * count)) - 1u;
  const auto others = hn::Set(d, ~(all << (4 * first)));
  const auto place = hn::ShiftLeft<2>(hn::Iota(d, 0)), nibble = hn::Set(d, 15);
  for (size_t u = 0; u < head_dim / kUnit; ++u) {
    for (size_t w = 0; w < 8; w += lanes) {
      auto* words = reinterpret_cast<uint32_t*>(tile) + 8 * u + w;
      auto merged = hn::And(hn::LoadU(d, words), others);
      for (int t = 0; t < count; ++t) {
        const auto channels = hn::Set(d, signs[t].units[u] >> (4 * w));
        const auto nibbles = hn::And(hn::Shr(channels, place), nibble);
        merged = hn::Or(merged, hn::ShiftLeftSame(nibbles, 4 * (first + t)));
      }
      hn::StoreU(merged, d, words);
    }
  }
}

// signs [count] to tokens `first` ... of the page.
inline void StoreSigns(const ChannelBits* signs, int first, int count, size_t head_dim,
                       uint8_t* page) {
  constexpr int kTile = nibble_tile::kTileTokens;
  const int tile_bytes = nibble_tile::tile_bytes(static_cast<int>(head_dim));
  for (int t = 0, n = 0; t < count; t += n) {
    const int token = first + t;
    n = HWY_MIN(kTile - token % kTile, count - t);
    StoreTileSigns(signs + t, token % kTile, n, head_dim,
                   page + int64_t{tile_bytes} * (token / kTile));
  }
}

// Negative channels of token `token` of the page: bit i of unit u is channel kUnit * u + i.
HWY_INLINE void UnpackTokenSigns(const uint8_t* page, int token, size_t head_dim,
                                 uint32_t* negative) {
  const int64_t tile_bytes = nibble_tile::tile_bytes(static_cast<int>(head_dim));
  UnpackSigns(page + tile_bytes * (token / nibble_tile::kTileTokens),
              token % nibble_tile::kTileTokens * 4, head_dim, negative);
}

// ---- narrow floats ------------------------------------------------------------------------------

// sikv_float_to_* of |x| up to the type's largest finite number: the bits without the sign. A
// subnormal is an integer multiple of the smallest one.
template <int kExpBits, int kManBits>
HWY_INLINE VU NarrowMagnitude(VF x) {
  const DF d;
  const DU du;
  constexpr int kBias = (1 << (kExpBits - 1)) - 1, kDrop = 23 - kManBits;
  const VF a = hn::Abs(x);
  const VU bits = hn::BitCast(du, a);
  const VU odd = hn::And(hn::ShiftRight<kDrop>(bits), hn::Set(du, 1));
  const VU rebias =
      hn::Set(du, (1u << (kDrop - 1)) - 1u - (static_cast<uint32_t>(127 - kBias) << 23));
  const VU normal = hn::ShiftRight<kDrop>(hn::Add(bits, hn::Add(odd, rebias)));
  const VF steps = hn::Mul(a, hn::Set(d, static_cast<float>(1 << (kBias - 1 + kManBits))));
  const VU subnormal = hn::BitCast(du, hn::NearestInt(steps));
  const VF smallest_normal = hn::BitCast(d, hn::Set(du, static_cast<uint32_t>(128 - kBias) << 23));
  return hn::IfThenElse(hn::RebindMask(du, hn::Lt(a, smallest_normal)), subnormal, normal);
}

// The inverse, exact; with the sign bit above the magnitude.
template <int kExpBits, int kManBits>
HWY_INLINE VF Widen(VU narrow) {
  const DF d;
  const DU du;
  constexpr int kBias = (1 << (kExpBits - 1)) - 1, kDrop = 23 - kManBits;
  const VU magnitude = hn::And(narrow, hn::Set(du, (1u << (kExpBits + kManBits)) - 1u));
  const VF normal = hn::BitCast(d, hn::Add(hn::ShiftLeft<kDrop>(magnitude),
                                           hn::Set(du, static_cast<uint32_t>(127 - kBias) << 23)));
  const VF subnormal = hn::Mul(hn::ConvertTo(d, hn::BitCast(hn::RebindToSigned<DU>(), magnitude)),
                               hn::Set(d, 1.0f / static_cast<float>(1 << (kBias - 1 + kManBits))));
  const auto is_subnormal = hn::Lt(magnitude, hn::Set(du, 1u << kManBits));
  const VU sign = hn::ShiftLeft<31>(hn::ShiftRight<kExpBits + kManBits>(narrow));
  return hn::Or(hn::IfThenElse(hn::RebindMask(d, is_subnormal), subnormal, normal),
                hn::BitCast(d, sign));
}

// x clamped to the type's largest finite number (minmax::store_saturated), rounded, as bits.
template <int kExpBits, int kManBits>
HWY_INLINE VU NarrowSaturated(VF x, float largest) {
  const DF d;
  const DU du;
  const VF clamped = hn::Min(hn::Max(x, hn::Set(d, -largest)), hn::Set(d, largest));
  const VU sign = hn::ShiftLeft<kExpBits + kManBits>(hn::ShiftRight<31>(hn::BitCast(du, x)));
  return hn::Or(NarrowMagnitude<kExpBits, kManBits>(clamped), sign);
}

// A scale type, for templates.
template <int kExp, int kMan>
struct NarrowType {
  static constexpr int kExpBits = kExp, kManBits = kMan, kBits = 1 + kExp + kMan;
};

// Calls body(NarrowType) for fp16, fp8_e4m3 or fp8_e5m2.
template <typename Body>
HWY_INLINE auto WithNarrowType(int32_t dtype, Body&& body) {
  switch (dtype) {
    case SIKV_FP16:
      return body(NarrowType<5, 10>());
    case SIKV_FP8_E4M3:
      return body(NarrowType<4, 3>());
    default:
      return body(NarrowType<5, 2>());
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET != HWY_SCALAR
#endif  // SIKV_KERNELS_COMMON_SIMD_PACK_TARGET_
