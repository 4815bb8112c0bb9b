// Rows of K or V as they are stored, decoded to fp32 vectors in registers.
//
// A block of rows is opened once, which resolves what belongs to a whole row (its scale, the signs
// of its channels, the entries of its min-max groups); a vector of channels then costs one load of
// codes, one shift and one table lookup, and one masked xor where signs lie in the index plane.
//
//   format       codes                      entry of a channel
//   fp32 ...     the number itself
//   coded b      b bits, bitpack.h          table[code], the same table for all rows; times the
//                                           row's scale
//   minmax2      2 bits, bitpack.h          scale * code + zero of the channel's group
//   signed ...   as above, b or 2 bits      negative where the index plane has no bit; or where
//                                           the row's own copy of its bits has none
//
// Include from a file that goes through hwy/foreach_target.h.

#ifndef SIKV_KERNELS_COMMON_SIMD_ROWS_H_
#define SIKV_KERNELS_COMMON_SIMD_ROWS_H_

#include <stddef.h>
#include <stdint.h>

#include "plugins/abi/sikv_abi.h"
#include "plugins/layouts/arithmetic.h"
#include "plugins/layouts/nibble_tile.h"

namespace sikv {

enum class RowFormat {
  kFp32,
  kFp16,
  kBf16,
  kCoded2,
  kCoded3,
  kCoded4,
  kMinMax2,
  kSigned1,
  kSigned2,
  kSigned3,
  kSignedMinMax2,
  kUnpacked,  // anything else: RowSource::unpack writes fp32 rows
};

constexpr bool IsSigned(RowFormat f) {
  return f >= RowFormat::kSigned1 && f <= RowFormat::kSignedMinMax2;
}
constexpr bool IsMinMax(RowFormat f) {
  return f == RowFormat::kMinMax2 || f == RowFormat::kSignedMinMax2;
}
// Formats with one factor per row.
constexpr bool IsScaled(RowFormat f) {
  return (f >= RowFormat::kCoded2 && f <= RowFormat::kCoded4) ||
         (f >= RowFormat::kSigned1 && f <= RowFormat::kSigned3);
}
constexpr int CodeBits(RowFormat f) {
  return f == RowFormat::kSigned1                              ? 1
         : f == RowFormat::kCoded3 || f == RowFormat::kSigned3 ? 3
         : f == RowFormat::kCoded4                             ? 4
                                                               : 2;
}

// One plane of a row source: token `slot` at base + page * page_stride + slot % 256 * token_bytes.
struct RowPlane {
  const uint8_t* base = nullptr;
  int64_t page_stride = 0;
  int64_t token_bytes = 0;
};

// Where the rows of one (sequence, KV head) lie, by slot.
struct RowSource {
  RowFormat format;
  const int32_t* page_table = nullptr;  // null: page i is page i, as in tail and pinned copies
  RowPlane code{}, sign{}, scale{};     // sign: token_bytes is of a tile of 8 tokens
  // kSigned*: bits of the signs so many bytes behind a row's code; 0: in the index plane, `sign`.
  int32_t own_signs = 0;
  // kCoded*, kSigned1..3: 16 entries, 2^bits of them repeated; 64-byte aligned.
  const float* table = nullptr;
  // kMinMax2, kSignedMinMax2: channels of a group, a multiple of 32; type of scale and zero.
  int scale_group = 32;
  int32_t scale_dtype = SIKV_FP16;
  // kUnpacked: out [count, D].
  void (*unpack)(const void* context, int row, const int32_t* slots, int count,
                 float* out) = nullptr;
  const void* context = nullptr;
  int row = 0;
};

// Rows handled at a time. What they need of the planes (at most 384 B each in the 2-bit formats)
// and their tables stay in an L1 of 32 KiB while the next block is on its way.
inline constexpr int kBlockRows = 32;
// Channels that share an entry of RowBlock::groups and a word of RowBlock::signs.
inline constexpr int kUnit = 32;
inline constexpr int kMaxUnits = kMaxHeadDim / kUnit;

// Rows are taken up to 16 at a time.
constexpr int PaddedRows(int count) { return (count + 15) / 16 * 16; }

// Some rows of a source, by address, and what opening them found. Entries behind `count` repeat the
// last row up to PaddedRows(count).
struct RowBlock {
  int count = 0;
  const uint8_t* code[kBlockRows];
  const uint8_t* sign[kBlockRows];  // the tile
  const uint8_t* scale_at[kBlockRows];
  int sign_shift[kBlockRows];  // of the row's nibble in the tile's words

  alignas(64) float scale[kBlockRows];
  alignas(64) uint32_t signs[kBlockRows][kMaxUnits];   // bit i: channel 32 u + i is negative
  alignas(64) float groups[kBlockRows][kMaxUnits][4];  // by code
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_ROWS_H_

#if defined(SIKV_KERNELS_COMMON_SIMD_ROWS_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_ROWS_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_ROWS_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_ROWS_TARGET_
#endif

#include <string.h>

#include "hwy/highway.h"

#if HWY_TARGET != HWY_SCALAR

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// 16 floats at most: 2^b entries of a table and 16 channels of b-bit codes are what one register
// and one or two words hold. Half of the smallest head_dim's unit, so units need no remainders.
inline constexpr size_t kLanes = HWY_HAVE_SCALABLE ? 4 : HWY_MIN(size_t{16}, HWY_MAX_BYTES / 4);
using DF = hn::FixedTag<float, kLanes>;
using DU = hn::FixedTag<uint32_t, kLanes>;
using DF4 = hn::FixedTag<float, 4>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;

#define SIKV_X86_AVX2 (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2)
#define SIKV_X86_AVX3 (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3)

template <typename T>
HWY_INLINE T LoadBytes(const uint8_t* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

// Codes of channels first .. first + kLanes - 1 in the low bits; above them lie other channels'.
// Reads no byte behind the row.
template <int kBits>
HWY_INLINE VU UnpackCodes(const uint8_t* row, size_t first) {
  const DU d;
  const auto eight = [&](const uint8_t* from) HWY_ATTR -> uint32_t {  // 8 channels, kBits bytes
    if constexpr (kBits == 1) return *from;
    if constexpr (kBits == 2) return LoadBytes<uint16_t>(from);
    if constexpr (kBits == 3) return LoadBytes<uint16_t>(from) | uint32_t{from[2]} << 16;
    return LoadBytes<uint32_t>(from);
  };
  const VU iota = hn::Iota(d, 0);
  if constexpr (kLanes == 16) {
    const uint8_t* from = row + first / 8 * kBits;
    if constexpr (kBits == 1) {
      return hn::Shr(hn::Set(d, LoadBytes<uint16_t>(from)), iota);
    } else if constexpr (kBits == 2) {
      return hn::Shr(hn::Set(d, LoadBytes<uint32_t>(from)), hn::ShiftLeft<1>(iota));
    } else {
      // Channels 8 .. 15 of 3 bits are bits 24 .. 47: bits 8 .. 31 of the word at byte 2.
      const auto lower = hn::FirstN(d, 8);
      const VU words = hn::IfThenElse(lower, hn::Set(d, LoadBytes<uint32_t>(from)),
                                      hn::Set(d, LoadBytes<uint32_t>(from + (kBits == 3 ? 2 : 4))));
      const VU shifts = hn::Mul(hn::And(iota, hn::Set(d, 7)), hn::Set(d, kBits));
      return hn::Shr(words, kBits == 3
                                ? hn::IfThenElse(lower, shifts, hn::Add(shifts, hn::Set(d, 8)))
                                : shifts);
    }
  } else {
    const uint32_t at = static_cast<uint32_t>(first % 8);
    return hn::Shr(hn::Set(d, eight(row + first / 8 * kBits)),
                   hn::Mul(hn::Add(iota, hn::Set(d, at)), hn::Set(d, kBits)));
  }
}

// table[code % 2^kBits] by lane; the table has 16 entries, 2^kBits of them repeated. x86 permutes
// read the low bits of an index and no others, which saves masking the codes.
template <int kBits>
HWY_INLINE VF Lookup(const float* table, VU codes) {
  const DF d;
  const DU du;
  if constexpr ((size_t{1} << kBits) > kLanes) {
    const auto upper = hn::RebindMask(d, hn::TestBit(codes, hn::Set(du, 1u << (kBits - 1))));
    return hn::IfThenElse(upper, Lookup<kBits - 1>(table + (1 << (kBits - 1)), codes),
                          Lookup<kBits - 1>(table, codes));
  } else {
#if SIKV_X86_AVX3
    return VF{_mm512_permutexvar_ps(codes.raw, hn::Load(d, table).raw)};
#elif SIKV_X86_AVX2
    return VF{_mm256_permutevar8x32_ps(hn::LoadU(d, table).raw, codes.raw)};
#else
    const VU index = hn::And(codes, hn::Set(du, kLanes - 1));
    return hn::TableLookupLanes(hn::LoadU(d, table), hn::IndicesFromVec(d, index));
#endif
  }
}

// The same with 4 entries per row and unit.
HWY_INLINE VF Lookup4(const float* table, VU codes) {
  const DF d;
  const VF entries = hn::LoadDup128(d, table);
#if SIKV_X86_AVX3
  return VF{_mm512_permutevar_ps(entries.raw, codes.raw)};
#elif SIKV_X86_AVX2
  return VF{_mm256_permutevar_ps(entries.raw, codes.raw)};
#else
  const VU index = hn::And(codes, hn::Set(DU(), 3));
  return hn::TableLookupLanes(entries, hn::IndicesFromVec(d, index));
#endif
}

// Changes the sign of lanes whose bit, from `at` on, is set in the unit's word.
HWY_INLINE VF ApplySigns(VF v, const uint32_t* unit, size_t at) {
#if SIKV_X86_AVX3
  const __mmask16 negative = LoadBytes<uint16_t>(reinterpret_cast<const uint8_t*>(unit) + at / 8);
  const __m512i bits = _mm512_castps_si512(v.raw);
  return VF{_mm512_castsi512_ps(_mm512_mask_xor_epi32(
      bits, negative, bits, _mm512_set1_epi32(static_cast<int>(0x80000000u))))};
#else
  const DU d;
  const VU shifts = hn::Sub(hn::Set(d, 31 - static_cast<uint32_t>(at)), hn::Iota(d, 0));
  const VU sign = hn::And(hn::Shl(hn::Set(d, *unit), shifts), hn::Set(d, 0x80000000u));
  return hn::Xor(v, hn::BitCast(DF(), sign));
#endif
}

// Negative channels of one token: bit i of unit u is channel 32 u + i. `tile` is the token's tile,
// `shift` 4 times its number in the tile.
HWY_INLINE void UnpackSigns(const uint8_t* tile, int shift, size_t head_dim, uint32_t* signs) {
#if HWY_TARGET == HWY_AVX3_DL
  // Two words are 8 channels of all 8 tokens: 8 of 64 bits, picked by number.
  const __m512i channels = _mm512_set1_epi64(0x2322212003020100);
  const __m512i pick = _mm512_add_epi8(channels, _mm512_set1_epi8(static_cast<char>(shift)));
  for (size_t d = 0; d < head_dim; d += 64) {
    const __mmask16 words = head_dim - d >= 64 ? 0xFFFF : 0x00FF;
    const __m512i loaded = _mm512_maskz_loadu_epi32(words, tile + d);
    const uint64_t negative = ~_mm512_bitshuffle_epi64_mask(loaded, pick);
    memcpy(signs + d / kUnit, &negative, head_dim - d >= 64 ? 8 : 4);
  }
#else
  // 8 words are a unit: the nibbles move to their places and are added.
  const hn::FixedTag<uint32_t, HWY_MIN(kLanes, 8)> d;
  const size_t lanes = hn::Lanes(d);
  const auto place = hn::ShiftLeft<2>(hn::Iota(d, 0));
  for (size_t u = 0; u < head_dim / kUnit; ++u) {
    uint32_t positive = 0;
    for (size_t w = 0; w < 8; w += lanes) {
      const auto words = hn::LoadU(d, reinterpret_cast<const uint32_t*>(tile) + 8 * u + w);
      const auto nibbles = hn::And(hn::ShiftRightSame(words, shift), hn::Set(d, 15));
      positive |= hn::GetLane(hn::SumOfLanes(d, hn::Shl(nibbles, place))) << (4 * w);
    }
    signs[u] = ~positive;
  }
#endif
}

// The same of a bit stream of a token's own, bit i set where channel i is not negative.
HWY_INLINE void LoadSigns(const uint8_t* positive, size_t head_dim, uint32_t* signs) {
  for (size_t u = 0; u < head_dim / kUnit; ++u) {
    signs[u] = ~LoadBytes<uint32_t>(positive + kUnit / 8 * u);
  }
}

// Entries of a row's min-max groups, by code, one set per unit.
HWY_INLINE void UnpackGroups(const uint8_t* pairs, const RowSource& source, size_t head_dim,
                             float (*groups)[4]) {
  const DF4 d4;
  const auto codes = hn::ConvertTo(d4, hn::Iota(hn::FixedTag<int32_t, 4>(), 0));
  if (source.scale_dtype == SIKV_FP16 && source.scale_group == kUnit) {
    // Two pairs at a time; of an odd number the last two once more.
    const hn::Rebind<hwy::float16_t, DF4> d16;
    const size_t units = head_dim / kUnit;
    for (size_t next = 0; next < units; next += 2) {
      const size_t u = HWY_MIN(next, units - 2);
      const auto pair =
          hn::PromoteTo(d4, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(pairs) + 2 * u));
      hn::Store(hn::MulAdd(codes, hn::Broadcast<0>(pair), hn::Broadcast<1>(pair)), d4, groups[u]);
      hn::Store(hn::MulAdd(codes, hn::Broadcast<2>(pair), hn::Broadcast<3>(pair)), d4,
                groups[u + 1]);
    }
    return;
  }
  const int per_group = source.scale_group / kUnit;
  for (int u = 0; u < static_cast<int>(head_dim) / kUnit; ++u) {
    const int64_t pair = 2 * (u / per_group);
    const auto scale = hn::Set(d4, sikv_load(pairs, source.scale_dtype, pair));
    const auto zero = hn::Set(d4, sikv_load(pairs, source.scale_dtype, pair + 1));
    hn::Store(hn::MulAdd(codes, scale, zero), d4, groups[u]);
  }
}

// Resolves what the rows of a block have as a whole. Their bytes are read here first.
template <RowFormat kFormat>
HWY_INLINE void OpenRows(const RowSource& source, size_t head_dim, RowBlock& block) {
  if constexpr (IsScaled(kFormat)) {
    alignas(64) hwy::float16_t scales[kBlockRows];
    const int padded = PaddedRows(block.count);
    for (int t = 0; t < padded; ++t) memcpy(&scales[t], block.scale_at[t], sizeof scales[t]);
    const DF d;
    const hn::Rebind<hwy::float16_t, DF> d16;
    for (size_t t = 0; t < static_cast<size_t>(padded); t += kLanes) {
      hn::Store(hn::PromoteTo(d, hn::Load(d16, scales + t)), d, block.scale + t);
    }
  }
  for (int t = 0; t < block.count; ++t) {
    if constexpr (IsMinMax(kFormat)) {
      UnpackGroups(block.scale_at[t], source, head_dim, block.groups[t]);
    }
    if constexpr (IsSigned(kFormat)) {
      if (source.own_signs > 0) {
        LoadSigns(block.code[t] + source.own_signs, head_dim, block.signs[t]);
      } else {
        UnpackSigns(block.sign[t], block.sign_shift[t], head_dim, block.signs[t]);
      }
    }
  }
}

// kLanes channels, from `first` on, of row t of an opened block, without the row's scale.
template <RowFormat kFormat>
HWY_INLINE VF DecodeRow(const RowSource& source, const RowBlock& block, int t, size_t first) {
  const DF d;
  const uint8_t* row = block.code[t];
  if constexpr (kFormat == RowFormat::kFp32) {
    return hn::LoadU(d, reinterpret_cast<const float*>(row) + first);
  } else if constexpr (kFormat == RowFormat::kFp16) {
    const hn::Rebind<hwy::float16_t, DF> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(row) + first));
  } else if constexpr (kFormat == RowFormat::kBf16) {
    const hn::Rebind<hwy::bfloat16_t, DF> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::bfloat16_t*>(row) + first));
  } else {
    const VU codes = UnpackCodes<CodeBits(kFormat)>(row, first);
    VF v;
    if constexpr (IsMinMax(kFormat)) {
      v = Lookup4(block.groups[t][first / kUnit], codes);
    } else {
      v = Lookup<CodeBits(kFormat)>(source.table, codes);
    }
    if constexpr (IsSigned(kFormat)) {
      v = ApplySigns(v, &block.signs[t][first / kUnit], first % kUnit);
    }
    return v;
  }
}

// x [n] <- n numbers of `dtype`, n a multiple of 16.
HWY_INLINE void LoadRow(const void* from, int32_t dtype, size_t n, float* x) {
  RowBlock block;
  block.code[0] = static_cast<const uint8_t*>(from);
  const RowSource source{RowFormat::kFp32};
  for (size_t i = 0; i < n; i += kLanes) {
    const VF v = dtype == SIKV_FP16   ? DecodeRow<RowFormat::kFp16>(source, block, 0, i)
                 : dtype == SIKV_BF16 ? DecodeRow<RowFormat::kBf16>(source, block, 0, i)
                                      : DecodeRow<RowFormat::kFp32>(source, block, 0, i);
    hn::StoreU(v, DF(), x + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET != HWY_SCALAR
#endif  // SIKV_KERNELS_COMMON_SIMD_ROWS_TARGET_
