// Tokens of the toolkit's layouts in registers, gathered from any slots, in the space attention
// needs: what can be undone once per query (rotation, centring, key scales) is not undone per
// token. The warp's counterpart of kernels/sparse_flash/sparse_flash_layouts.h.
//
// Two readings of the same planes or lines (rlm4line, whose gathers cost one 64-byte access of
// memory a key where the planes cost four):
//   load_unit       any layout: 8 neighbouring channels of one token as fp32 in one lane
//   KeyTile         the pipeline's keys (rlm4 of 3 bits; sign4 of 2 with fp16 scales a 32
//   channels),
//                   D = 128: logits of 16 tokens x 8 heads on the tensor cores, exact up to fp32's
//                   last bits
#ifndef SIKV_KERNELS_COMMON_WARP_ROWS_CUH_
#define SIKV_KERNELS_COMMON_WARP_ROWS_CUH_

#include "kernels/common/thread_cache.cuh"
#include "kernels/common/warp_mma.cuh"
#include "plugins/layouts/intq_v1.h"
#include "plugins/layouts/kivi_v1.h"
#include "plugins/layouts/raw_v1.h"
#include "plugins/layouts/rlm4_v1.h"
#include "plugins/layouts/sign4_v1.h"
#include "plugins/sdk/view.h"

namespace sikv::cuda {

enum class RowKind : int32_t {
  kRaw,            // rows in `dtype`; sign4 and intq at 16 bits too
  kCodebook,       // sign4 without magnitudes
  kSignMinMax,     // sign4, without mean and alpha
  kSignLevels,     // rlm4, rotated and centred
  kMinMax,         // intq, kiviv
  kLevels,         // rlm4v, rotated and centred
  kChannelMinMax,  // kivi
};

// The keys or the values of a layer, by value to kernels.
struct RowStore {
  RowKind kind = RowKind::kRaw;
  int32_t head_dim = 0;
  int32_t bits = 0;           // of a code in `payload`; of the Lloyd-Max quantiser for levels
  int32_t scale_group = 0;    // channels; tokens for kChannelMinMax
  int32_t dtype = SIKV_FP16;  // of rows (kRaw) or of scales
  int32_t line = 0;           // bytes of the lines that keys and the scales of levels lie in, or 0
  Plane index, payload, scale;
  const float* codebook = nullptr;  // [B, H, D/4, 16, 4]
  const float* mean = nullptr;      // [B, H, D], null where tokens are read with it
  const float* alpha = nullptr;     // [B, H, D], null where there is none

  __host__ __device__ bool rotated() const {
    return kind == RowKind::kSignLevels || kind == RowKind::kLevels;
  }
  // Bytes from one token's scale to the next one's, for levels.
  __host__ __device__ int scale_stride() const { return rlm4::scale_stride(line); }
};

// Host. What a layout says of it, without pointers; false if it is none that is read here.
inline bool read_key_layout(const LayoutView& layout, RowStore& rows) {
  rows.head_dim = layout.head_dim();
  if (layout.is(raw::kFamily, raw::kVersion)) {
    rows.dtype = raw::read_params(layout).dtype;
  } else if (layout.is(kivi::kFamily, kivi::kVersion)) {
    const kivi::Params p = kivi::read_params(layout);
    rows.kind = RowKind::kChannelMinMax;
    rows.bits = p.bits;
    rows.scale_group = p.group;
  } else if (layout.is(sign4::kFamily, sign4::kVersion)) {
    const sign4::Params p = sign4::read_params(layout);
    if (p.magnitude_bits == 16) {
      rows.dtype = p.key_dtype;
      return true;
    }
    rows.kind = p.magnitude_bits == 0 ? RowKind::kCodebook : RowKind::kSignMinMax;
    rows.bits = p.magnitude_bits;
    rows.scale_group = p.scale_group;
    rows.dtype = p.scale_dtype;
  } else if (rlm4::is_keys(layout)) {
    rows.kind = RowKind::kSignLevels;
    rows.line = rlm4::read_line(layout);
    rows.bits = rlm4::read_params(layout).bits;
  } else {
    return false;
  }
  return true;
}

inline bool read_value_layout(const LayoutView& layout, RowStore& rows) {
  rows.head_dim = layout.head_dim();
  if (layout.is(raw::kFamily, raw::kVersion)) {
    rows.dtype = raw::read_params(layout).dtype;
  } else if (layout.is(intq::kFamily, intq::kVersion) ||
             layout.is(intq::kKiviFamily, intq::kVersion)) {
    const intq::Params p = intq::read_params(layout);
    if (p.bits == 16) {
      rows.dtype = p.value_dtype;
      return true;
    }
    rows.kind = RowKind::kMinMax;
    rows.bits = p.bits;
    rows.scale_group = p.scale_group;
    rows.dtype = p.scale_dtype;
  } else if (rlm4::is_values(layout)) {
    rows.kind = RowKind::kLevels;
    rows.line = rlm4::read_line(layout);
    rows.bits = rlm4::read_params(layout).bits;
  } else {
    return false;
  }
  return true;
}

// Host. The whole of it.
inline RowStore key_rows(const sikv_store_view& store) {
  RowStore rows;
  if (!read_key_layout(LayoutView(*store.layout), rows)) {
    throw PluginBug("keys of a layout that was not accepted");
  }
  rows.index = plane_of(store, SIKV_INDEX_CODE);
  rows.payload = plane_of(store, SIKV_MAGNITUDE);
  rows.scale = plane_of(store, SIKV_SCALE);
  if (rows.kind == RowKind::kRaw) return rows;  // sign4 has tables there too: not needed
  rows.mean = table_of(store, SIKV_KEY_MEAN);
  if (rows.kind == RowKind::kCodebook) rows.codebook = table_of(store, SIKV_CODEBOOK);
  if (rows.kind == RowKind::kSignMinMax) rows.alpha = table_of(store, SIKV_KEY_SCALE);
  return rows;
}

inline RowStore value_rows(const sikv_store_view& store) {
  RowStore rows;
  if (!read_value_layout(LayoutView(*store.layout), rows)) {
    throw PluginBug("values of a layout that was not accepted");
  }
  rows.payload = plane_of(store, SIKV_VALUE_CODE);
  rows.scale = plane_of(store, SIKV_VALUE_SCALE);
  rows.mean = table_of(store, SIKV_VALUE_MEAN);
  return rows;
}

// ---- any layout, 8 channels a lane --------------------------------------------------------------

inline constexpr int kUnit = 8;  // channels: two sign nibbles, `bits` whole bytes of codes

__device__ inline void load_raw_unit(const void* row, int32_t dtype, int unit, float (&x)[kUnit]) {
  if (dtype == SIKV_FP32) {
    const float4* words = static_cast<const float4*>(row) + 2 * unit;
    const float4 a = words[0], b = words[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    return;
  }
  const uint4 words = static_cast<const uint4*>(row)[unit];
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == SIKV_BF16) {
      x[2 * i] = __uint_as_float(pairs[i] << 16);
      x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    } else {
      const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
      x[2 * i] = f.x;
      x[2 * i + 1] = f.y;
    }
  }
}

// 8 codes of `bits` bits, from byte bits * unit of a row.
struct UnitCodes {
  uint32_t low, high;  // high only at 8 bits
  int bits;

  __device__ UnitCodes(const uint8_t* row, int bits, int unit) : low(0), high(0), bits(bits) {
    const uint8_t* p = row + bits * unit;
    switch (bits) {
      case 1:
        low = *p;
        break;
      case 2:
        low = *reinterpret_cast<const uint16_t*>(p);
        break;
      case 3:
        low = p[0] | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16;
        break;
      case 4:
        low = *reinterpret_cast<const uint32_t*>(p);
        break;
      default: {
        const uint2 words = *reinterpret_cast<const uint2*>(p);
        low = words.x;
        high = words.y;
      }
    }
  }
  __device__ uint32_t operator[](int i) const {
    if (bits == 8) return (i < 4 ? low : high) >> (8 * (i % 4)) & 255u;
    return low >> (bits * i) & ((1u << bits) - 1u);
  }
};

__device__ inline float load_scale(const uint8_t* scales, int32_t dtype, int i) {
  if (dtype == SIKV_FP16) return __half2float(reinterpret_cast<const __half*>(scales)[i]);
  return sikv_load(scales, dtype, i);
}

// Value of a level without a table in memory, where lanes' different levels would queue up.
__device__ inline float level_of(int bits, uint32_t level) {
  const auto pick = [&](int b) {
    float value = rlm4::level_value(b, 0);
#pragma unroll
    for (int i = 1; i < 8; ++i) {
      if (i < rlm4::num_levels(b)) {
        value = level == static_cast<uint32_t>(i) ? rlm4::level_value(b, i) : value;
      }
    }
    return value;
  };
  return bits == 2 ? pick(2) : bits == 3 ? pick(3) : pick(4);
}

// Signs of 8 channels, bit i set where channel i is not negative.
__device__ inline uint32_t unit_signs(const RowStore& rows, int64_t page, int token, int unit) {
  const uint8_t* tile = rows.index.page(page) + rows.head_dim * (token / nibble_tile::kTileTokens);
  const uint2 words = *reinterpret_cast<const uint2*>(tile + 8 * unit);
  const int shift = token % nibble_tile::kTileTokens * 4;
  return (words.x >> shift & 15u) | (words.y >> shift & 15u) << 4;
}

// x [8] = channels 8 unit .. of token `token` of page number `page`; row is its b * H + h.
__device__ inline void load_unit(const RowStore& rows, int row, int64_t page, int token, int unit,
                                 float (&x)[kUnit]) {
  const auto payload = [&](int row_bytes) {
    return rows.payload.page(page) + int64_t{row_bytes} * token;
  };
  switch (rows.kind) {
    case RowKind::kRaw:
      load_raw_unit(payload(rows.head_dim * sikv_dtype_bytes(rows.dtype)), rows.dtype, unit, x);
      return;
    case RowKind::kCodebook: {
      const uint32_t signs = unit_signs(rows, page, token, unit);
      const float4* book = reinterpret_cast<const float4*>(rows.codebook) +
                           (int64_t{row} * (rows.head_dim / 4) + 2 * unit) * 16;
      const float4 a = book[signs & 15u], b = book[16 + (signs >> 4)];
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
      x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
      return;
    }
    case RowKind::kSignMinMax:
    case RowKind::kMinMax: {
      const UnitCodes codes(payload(rows.head_dim / 8 * rows.bits), rows.bits, unit);
      const int groups = rows.head_dim / rows.scale_group, group = kUnit * unit / rows.scale_group;
      const uint8_t* scales =
          rows.scale.page(page) + int64_t{2 * groups * sikv_dtype_bytes(rows.dtype)} * token;
      const float scale = load_scale(scales, rows.dtype, 2 * group);
      const float zero = load_scale(scales, rows.dtype, 2 * group + 1);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) x[i] = fmaf(static_cast<float>(codes[i]), scale, zero);
      if (rows.kind == RowKind::kSignMinMax) {
        const uint32_t signs = unit_signs(rows, page, token, unit);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) x[i] = (signs >> i & 1u) != 0 ? x[i] : -x[i];
      }
      return;
    }
    case RowKind::kSignLevels: {
      const bool lines = rows.line > 0;
      const uint8_t* row = payload(lines ? rows.line : rows.head_dim / 8 * (rows.bits - 1));
      const UnitCodes codes(row, rows.bits - 1, unit);
      const uint32_t signs =
          lines ? row[rlm4::line_signs(rows.head_dim) + unit] : unit_signs(rows, page, token, unit);
      const float scale =
          load_scale(rows.scale.page(page) + rows.scale_stride() * token, SIKV_FP16, 0);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const float y = level_of(rows.bits, codes[i]) * scale;
        x[i] = (signs >> i & 1u) != 0 ? y : -y;
      }
      return;
    }
    case RowKind::kLevels: {
      const UnitCodes codes(payload(rows.head_dim / 8 * rows.bits), rows.bits, unit);
      const float scale =
          load_scale(rows.scale.page(page) + rows.scale_stride() * token, SIKV_FP16, 0);
      const uint32_t sign = 1u << (rows.bits - 1);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const float y = level_of(rows.bits, codes[i] & (sign - 1u)) * scale;
        x[i] = (codes[i] & sign) != 0 ? y : -y;
      }
      return;
    }
    case RowKind::kChannelMinMax: {
      const UnitCodes codes(payload(rows.head_dim / 8 * rows.bits), rows.bits, unit);
      const uint4* pairs =
          reinterpret_cast<const uint4*>(rows.scale.page(page) +
                                         int64_t{4 * rows.head_dim} * (token / rows.scale_group)) +
          2 * unit;
      const uint4 low = pairs[0], high = pairs[1];
      const uint32_t words[kUnit] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const float2 range = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        x[i] = fmaf(static_cast<float>(codes[i]), range.x, range.y);
      }
      return;
    }
  }
}

// ---- a query's side of it -----------------------------------------------------------------------
//
// A warp holds x [D] with channel lane + 32 i in x[i]; n = D / 32.

inline constexpr int kMaxLaneChannels = kMaxHeadDim / 32;

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

// Elements `offset` + lane + 32 i of an array of the input's type.
template <int kN>
__device__ inline void warp_load(const void* data, int32_t dtype, int64_t offset, int head_dim,
                                 float (&x)[kN]) {
  const int64_t first = offset + threadIdx.x % 32;
  const auto load = [&](auto* typed) {
#pragma unroll
    for (int i = 0; i < kN; ++i) x[i] = 32 * i < head_dim ? to_float(typed[first + 32 * i]) : 0.0f;
  };
  if (dtype == SIKV_FP16) {
    load(static_cast<const __half*>(data));
  } else if (dtype == SIKV_BF16) {
    load(static_cast<const __nv_bfloat16*>(data));
  } else {
    load(static_cast<const float*>(data));
  }
}

// x <- blockdiag(H) x of plugins/layouts/rotation.h, by the very same sums.
template <int kN>
__device__ inline void warp_hadamard(float (&x)[kN], int head_dim) {
  const int lane = threadIdx.x % 32, block = rotation::block(head_dim);
#pragma unroll
  for (int half = 1; half < 32; half *= 2) {
    const float sign = (lane & half) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      x[i] = fmaf(sign, x[i], __shfl_xor_sync(0xffffffffu, x[i], half));
    }
  }
#pragma unroll
  for (int half = 1; half < kN; half *= 2) {
    if (32 * half >= block) break;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if ((i & half) != 0 || i + half >= kN) continue;
      const float lower = x[i], upper = x[i + half];
      x[i] = lower + upper;
      x[i + half] = lower - upper;
    }
  }
  const float norm = rotation::norm(block);
#pragma unroll
  for (int i = 0; i < kN; ++i) x[i] *= norm;
}

// Bit b of word i: the sign of channel 32 i + b in rotation.h is negative.
constexpr uint32_t negative_signs(int i) {
  uint32_t bits = 0;
  for (int b = 0; b < 32; ++b) bits |= (rotation::sign(32 * i + b) < 0.0f ? 1u : 0u) << b;
  return bits;
}
template <int kI>
inline constexpr uint32_t kNegativeSigns = negative_signs(kI);

// +-1 of rotation.h for channels lane + 32 i.
template <int kN>
__device__ inline void warp_flip_signs(float (&x)[kN]) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t words[kMaxLaneChannels] = {kNegativeSigns<0>, kNegativeSigns<1>, kNegativeSigns<2>,
                                            kNegativeSigns<3>, kNegativeSigns<4>, kNegativeSigns<5>,
                                            kNegativeSigns<6>, kNegativeSigns<7>};
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    x[i] = __uint_as_float(__float_as_uint(x[i]) ^ (words[i] << (31 - lane) & 0x80000000u));
  }
}

// Query q (exact, past the head_dim zero) into the space of the row's loaded keys.
template <int kN>
__device__ inline void warp_prepare_query(const RowStore& keys, int row, float (&q)[kN]) {
  const int lane = threadIdx.x % 32;
  if (keys.rotated()) {
    warp_flip_signs(q);
    warp_hadamard(q, keys.head_dim);
  } else if (keys.alpha != nullptr) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (32 * i < keys.head_dim) {
        q[i] *= keys.alpha[int64_t{row} * keys.head_dim + lane + 32 * i];
      }
    }
  }
}

// What tokens are read without. Made ahead of the query's use, it is on its way together with it.
template <int kN>
class KeyMean {
 public:
  __device__ KeyMean(const RowStore& keys, int row) : any_(keys.mean != nullptr) {
    if (any_) warp_load(keys.mean, SIKV_FP32, int64_t{row} * keys.head_dim, keys.head_dim, mean_);
  }
  // q.mean, what is missing from the logits of encoded tokens.
  __device__ float shift(const float (&q)[kN]) const {
    if (!any_) return 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kN; ++i) sum = fmaf(q[i], mean_[i], sum);
    return warp_sum(sum);
  }

 private:
  bool any_;
  float mean_[kN];
};

// Sum of loaded values whose weights add up to `sum`, back to the space V came in; mean: theirs, as
// the warp holds it.
template <int kN>
__device__ inline void warp_restore_value(const RowStore& values, const float (&mean)[kN],
                                          float sum, float (&acc)[kN]) {
  warp_hadamard(acc, values.head_dim);
  warp_flip_signs(acc);
#pragma unroll
  for (int i = 0; i < kN; ++i) acc[i] = fmaf(sum, mean[i], acc[i]);
}

// Starts the way of the 64 bytes around an address from memory to L2 without a register to wait
// for: a copy of a word to shared memory that nobody reads. prefetch.global.L2 is only a hint, and
// of random gathers half the hints are dropped: these take a tenth off sparse_flash (44.8 to 40.3
// us for 64 rows of 2048 of 128K tokens in planes), with half the bytes from memory. `wait` before
// the block ends.
class L2Touch {
 public:
  __device__ L2Touch() {
    constexpr int kWords = 128;
    __shared__ uint32_t touched[kWords];
    to_ = static_cast<uint32_t>(__cvta_generic_to_shared(touched + threadIdx.x % kWords));
  }
  __device__ void operator()(const void* address) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to_),
                 "l"(reinterpret_cast<uintptr_t>(address) & ~uintptr_t{3}));
  }
  __device__ void wait() const { asm volatile("cp.async.wait_all;"); }

 private:
  uint32_t to_;
};

// Two bytes in a register of their own. Of 16-bit registers the compiler packs two into one, and of
// a pair it moves a half elsewhere, as soon as both are asked for: that waits for them, where a
// loop means to go on with what it has.
__device__ inline uint32_t load_half(const void* address) {
  uint32_t half;
  asm("ld.global.nc.u16 %0, [%1];" : "=r"(half) : "l"(address));
  return half;
}

// ---- keys on the tensor cores -------------------------------------------------------------------
//
// D = 128. Key codes are small integers: 3-bit Lloyd-Max levels times 10^4 have two signed bytes,
// sign * code of sign4 one. The prepared query of a head is written as 23-bit integers of three
// signed bytes (most significant first), so that int8 products give exact sums:
//
//   rlm4    logit = unit scale (2^16 hi.d2 + 2^8 (hi.d1 + lo.d2) + hi.d0 + lo.d1)    lo.d0 < 2^-24
//   sign4   logit = unit sum_groups (scale (s c).q + zero s.q)
//
// A sign nibble s and four 2-bit codes become four selectors s << 2 | code; prmt.b32 then looks
// four bytes up at once. Which channel stands at which k is free as long as query and keys agree:
//
//   rlm4    k-step s, lane j, register h, byte i: channel 32 j + 8 s + 2 i + h: a lane reads 32
//           neighbouring channels of a token, in two 16-byte and one 8-byte loads
//   sign4   channel 32 s + 8 j + 2 i + h: one k-step is one group of scales
//
// Of rlm4line a lane reads 8 bytes of levels and one word of signs, from one line.
enum class TileKeys { kLevels3, kLineLevels3, kSignMinMax2 };

inline constexpr int kTileDim = 128, kTileTokens = 16, kTileSteps = 4, kTileDigits = 3;

// The query heads of one row, 8 at a time, in shared memory: built once by a block.
struct TileQuery {
  uint2 digits[kTileSteps][kTileDigits][32];
  float unit[8];  // of head n: what an integer of 1 stands for
};

constexpr bool has_levels(TileKeys keys) { return keys != TileKeys::kSignMinMax2; }

// Host. Whether KeyTile reads these rows.
inline bool tile_reads(const RowStore& keys) {
  if (keys.head_dim != kTileDim) return false;
  if (keys.kind == RowKind::kSignLevels) return keys.bits == 3;
  return keys.kind == RowKind::kSignMinMax && keys.bits == 2 && keys.scale_group == 32 &&
         keys.dtype == SIKV_FP16;
}
// Host. body(std::integral_constant<TileKeys, ...>{}) of rows that it reads.
template <typename Body>
void with_tile_keys(const RowStore& keys, Body&& body) {
  if (keys.kind == RowKind::kSignMinMax) {
    body(std::integral_constant<TileKeys, TileKeys::kSignMinMax2>{});
  } else if (keys.line > 0) {
    body(std::integral_constant<TileKeys, TileKeys::kLineLevels3>{});
  } else {
    body(std::integral_constant<TileKeys, TileKeys::kLevels3>{});
  }
}

// The digits of a head's prepared query (warp_prepare_query), channel lane + 32 i in x[i]; returns
// what an integer of 1 stands for. place(step, d, j): a lane's fragment that digit d goes to. One
// warp.
template <TileKeys kKeys, typename Place>
__device__ inline float split_query(const float (&x)[kTileDim / 32], Place&& place) {
  const int lane = threadIdx.x % 32;
  const float largest =
      warp_max(fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3]))));
  constexpr float kRange = 4194304.0f;  // 2^22
  // Below 2^-100 the inverse would overflow; such a head counts as zero.
  const float inverse = largest > 7.9e-31f ? kRange / largest : 0.0f;
#pragma unroll
  for (int i = 0; i < kTileDim / 32; ++i) {
    // Channel c = lane + 32 i: byte lane % 8 / 2 of register lane % 2.
    const int j = has_levels(kKeys) ? i : lane / 8;
    const int step = has_levels(kKeys) ? lane / 8 : i;
    int rest = __float2int_rn(x[i] * inverse);
#pragma unroll
    for (int d = kTileDigits - 1; d >= 0; --d) {
      const int digit = static_cast<int8_t>(rest & 255);
      rest = (rest - digit) >> 8;
      auto* bytes = reinterpret_cast<int8_t*>(place(step, d, j));
      bytes[lane % 2 * 4 + lane % 8 / 2] = static_cast<int8_t>(digit);
    }
  }
  // Of rlm4's sums the lowest digit stands for 2^8: a level has two.
  return largest / kRange * (has_levels(kKeys) ? 256e-4f : 1.0f);
}

// Head n < 8 of `tile` from its prepared query. One warp; visible after the next barrier.
template <TileKeys kKeys>
__device__ inline void store_tile_query(const float (&x)[kTileDim / 32], int n, TileQuery& tile) {
  const float unit = split_query<kKeys>(
      x, [&](int step, int d, int j) { return &tile.digits[step][d][4 * n + j]; });
  if (threadIdx.x % 32 == 0) tile.unit[n] = unit;
}

// Head n that is none: its logits are 0. One warp.
__device__ inline void clear_tile_query(int n, TileQuery& tile) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) tile.unit[n] = 0.0f;
  for (int i = lane; i < kTileSteps * kTileDigits * 4; i += 32) {
    tile.digits[i / (4 * kTileDigits)][i / 4 % kTileDigits][4 * n + i % 4] = {0, 0};
  }
}

// q [heads <= 8, 128] fp32, prepared, in shared memory. All threads of the block call it; visible
// after the next barrier.
template <TileKeys kKeys>
__device__ inline void build_tile_query(const float* q, int heads, TileQuery& tile) {
  for (int n = threadIdx.x / 32; n < 8; n += blockDim.x / 32) {
    if (n >= heads) {
      clear_tile_query(n, tile);
      continue;
    }
    float x[kTileDim / 32];
#pragma unroll
    for (int i = 0; i < kTileDim / 32; ++i) x[i] = q[n * kTileDim + threadIdx.x % 32 + 32 * i];
    store_tile_query<kKeys>(x, n, tile);
  }
}

// Up to four query heads for keys of levels: two digits share a product, columns n and n + 4 of
// head n, so that 3 products do what takes 5, and every lane ends with logits.
//
//   [0]   d2 | d1
//   [1]    0 | d0
struct FourQueries {
  uint2 digits[kTileSteps][2][32];
  float unit[4];
};
// Head n < 4 of `four` from its prepared query, 0 where there is none. One warp; visible after the
// next barrier.
template <TileKeys kKeys>
__device__ inline void store_four_query(const float (&x)[kTileDim / 32], int n, FourQueries& four) {
  const int lane = threadIdx.x % 32;
  const float unit = split_query<kKeys>(x, [&](int step, int d, int j) {
    return &four.digits[step][d / 2][4 * (d == 0 ? n : n + 4) + j];
  });
  if (lane == 0) four.unit[n] = unit;
  if (lane < 4 * kTileSteps) four.digits[lane / 4][1][4 * n + lane % 4] = {0, 0};
}
// q [heads <= 4, 128] as for build_tile_query.
template <TileKeys kKeys>
__device__ inline void build_four_queries(const float* q, int heads, FourQueries& four) {
  for (int n = threadIdx.x / 32; n < 4; n += blockDim.x / 32) {
    float x[kTileDim / 32];
#pragma unroll
    for (int i = 0; i < kTileDim / 32; ++i) {
      x[i] = n < heads ? q[n * kTileDim + threadIdx.x % 32 + 32 * i] : 0.0f;
    }
    store_four_query<kKeys>(x, n, four);
  }
}

// The codes of 16 tokens: a lane holds a part of tokens r and r + 8, r = lane / 4.
template <TileKeys kKeys>
struct KeyTile {
  static constexpr bool kLines = kKeys == TileKeys::kLineLevels3;
  static constexpr int kLine = rlm4::line_bytes(kTileDim);

  uint32_t index[2][kLines ? 1 : 8];  // words of the index tiles; or the 8 nibbles of the token
  uint64_t levels[2];                 // 32 codes; not split before they are used: see load_half
  uint4 scale[2];                     // rlm4: one fp16 in x; sign4: four pairs
  int shift[2];                       // bit of the token's nibble in a word

  // i = 0: token r, 1: token r + 8. Only issues loads.
  __device__ void load(const RowStore& keys, int i, int64_t page, int token) {
    const int j = threadIdx.x % 4;
    if constexpr (kLines) {
      const uint8_t* line = keys.payload.page(page) + kLine * token;
      levels[i] = __ldg(reinterpret_cast<const uint64_t*>(line + 8 * j));
      constexpr int kSigns = rlm4::line_signs(kTileDim), kScale = rlm4::line_key_scale(kTileDim);
      index[i][0] = __ldg(reinterpret_cast<const uint32_t*>(line + kSigns + 4 * j));
      scale[i].x = load_half(line + kScale);
      return;
    }
    const uint8_t* tile = keys.index.page(page) + kTileDim * (token / nibble_tile::kTileTokens);
    const uint8_t* row = keys.payload.page(page) + 32 * token;
    shift[i] = token % nibble_tile::kTileTokens * 4;
    if constexpr (has_levels(kKeys)) {
      const uint4* words = reinterpret_cast<const uint4*>(tile + 32 * j);
      const uint4 a = __ldg(words), b = __ldg(words + 1);
      index[i][0] = a.x, index[i][1] = a.y, index[i][2] = a.z, index[i][3] = a.w;
      index[i][4] = b.x, index[i][5] = b.y, index[i][6] = b.z, index[i][7] = b.w;
      levels[i] = __ldg(reinterpret_cast<const uint64_t*>(row + 8 * j));
      scale[i].x = load_half(keys.scale.page(page) + 2 * token);
    } else {
#pragma unroll
      for (int s = 0; s < kTileSteps; ++s) {
        const uint2 words = __ldg(reinterpret_cast<const uint2*>(tile + 32 * s + 8 * j));
        index[i][2 * s] = words.x, index[i][2 * s + 1] = words.y;
      }
      levels[i] = 0;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const auto* codes = reinterpret_cast<const unsigned short*>(row + 16 * s + 2 * j);
        const uint32_t both = __ldg(codes) | static_cast<uint32_t>(__ldg(codes + 4)) << 16;
        levels[i] |= static_cast<uint64_t>(both) << (32 * s);
      }
      scale[i] = __ldg(reinterpret_cast<const uint4*>(keys.scale.page(page) + 16 * token));
    }
  }

  // c: logits of tokens r, r + 8 (rows) and heads 2 j, 2 j + 1 (columns) of `query`.
  __device__ void score(const TileQuery& query, float (&c)[4]) const {
    const int lane = threadIdx.x % 32;
    const float unit[2] = {query.unit[2 * (lane % 4)], query.unit[2 * (lane % 4) + 1]};
    if constexpr (has_levels(kKeys)) {
      int sum2[4] = {}, sum1[4] = {}, sum0[4] = {};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t selectors[2][2];
        select(pair, selectors);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int s = 2 * pair + half;
          uint32_t hi[4], lo[4];
          look_up(selectors, half, kHighNegative, kHighPositive, hi);
          look_up(selectors, half, kLowNegative, kLowPositive, lo);
          const uint2 d2 = query.digits[s][0][lane], d1 = query.digits[s][1][lane],
                      d0 = query.digits[s][2][lane];
          mma_s8(sum2, hi, d2);
          mma_s8(sum1, hi, d1);
          mma_s8(sum0, hi, d0);
          mma_s8(sum1, lo, d2);
          mma_s8(sum0, lo, d1);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = fmaf(static_cast<float>(sum2[i]), 65536.0f,
                               static_cast<float>(sum1[i] * 256 + sum0[i]));
        c[i] = sum * (half_of(scale[i / 2].x, 0) * unit[i % 2]);
      }
    } else {
      float sum[4] = {};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t selectors[2][2];
        select(pair, selectors);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int s = 2 * pair + half;
          uint32_t signed_code[4], sign[4];
          look_up(selectors, half, 0xfdfeff00u, 0x03020100u, signed_code);
          look_up(selectors, half, 0xffffffffu, 0x01010101u, sign);
          int codes[kTileDigits][4] = {}, signs[kTileDigits][4] = {};
#pragma unroll
          for (int d = 0; d < kTileDigits; ++d) {
            const uint2 digit = query.digits[s][d][lane];
            mma_s8(codes[d], signed_code, digit);
            mma_s8(signs[d], sign, digit);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint4& pairs = scale[i / 2];
            const uint32_t range = s == 0 ? pairs.x : s == 1 ? pairs.y : s == 2 ? pairs.z : pairs.w;
            // At most 3 * 65 * 32 * 2^16 < 2^31.
            const int code = codes[0][i] * 65536 + codes[1][i] * 256 + codes[2][i];
            const int one = signs[0][i] * 65536 + signs[1][i] * 256 + signs[2][i];
            sum[i] = fmaf(static_cast<float>(code), half_of(range, 0), sum[i]);
            sum[i] = fmaf(static_cast<float>(one), half_of(range, 1), sum[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = sum[i] * unit[i % 2];
    }
  }

  // c: logits of heads 2 (lane % 2) and the next, of token r, in lanes of lane % 4 >= 2 of r + 8.
  __device__ void score(const FourQueries& query, float (&c)[2]) const {
    static_assert(has_levels(kKeys));
    const int lane = threadIdx.x % 32;
    int high[4] = {}, low[4] = {}, lowest[4] = {};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t selectors[2][2];
      select(pair, selectors);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int s = 2 * pair + half;
        uint32_t hi[4], lo[4];
        look_up(selectors, half, kHighNegative, kHighPositive, hi);
        look_up(selectors, half, kLowNegative, kLowPositive, lo);
        const uint2 d21 = query.digits[s][0][lane], d0 = query.digits[s][1][lane];
        mma_s8(high, hi, d21);
        mma_s8(low, lo, d21);
        mma_s8(lowest, hi, d0);
      }
    }
    // Times 256 the sum of hi.d2 2^8 + lo.d2, and hi.d1 2^8 + lo.d1 + hi.d0: below 2^29 each.
    int sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = high[i] * 256 + low[i] + lowest[i];
    const bool second = (lane & 2) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int other = __shfl_xor_sync(~0u, second ? sum[i] : sum[i + 2], 2);
      const int upper = second ? other : sum[i], lower = second ? sum[i + 2] : other;
      const float whole = fmaf(static_cast<float>(upper), 256.0f, static_cast<float>(lower));
      c[i] = whole * (half_of(second ? scale[1].x : scale[0].x, 0) * query.unit[lane % 2 * 2 + i]);
    }
  }

 private:
  // Bytes of the levels times 10^4, in two's complement digits: hi * 256 + lo.
  static constexpr int level_integer(int level) {
    return static_cast<int>(rlm4::level_value(3, level) * 10000.0f + 0.5f);
  }
  static constexpr int low_digit(int level) { return (level_integer(level) + 128) % 256 - 128; }
  static constexpr int high_digit(int level) {
    return (level_integer(level) - low_digit(level)) / 256;
  }
  static constexpr uint32_t table(int sign, bool high) {
    uint32_t bytes = 0;
    for (int level = 0; level < 4; ++level) {
      const int digit = sign * (high ? high_digit(level) : low_digit(level));
      bytes |= (static_cast<uint32_t>(digit) & 255u) << (8 * level);
    }
    return bytes;
  }
  static constexpr uint32_t kHighNegative = table(-1, true), kHighPositive = table(1, true);
  static constexpr uint32_t kLowNegative = table(-1, false), kLowPositive = table(1, false);

  __device__ static float half_of(uint32_t pair, int i) {
    const __half2 h = *reinterpret_cast<const __half2*>(&pair);
    return i == 0 ? __low2float(h) : __high2float(h);
  }

  __device__ uint32_t tile_signs(int t, int pair) const {
    if constexpr (kLines) {
      const uint32_t twice = prmt(index[t][0], 0u, pair == 0 ? 0x1100u : 0x3322u);
      return (twice & 0x000f000fu) | (twice >> 4 & 0x0f000f00u);
    } else {
      const uint32_t* words = &index[t][4 * pair];
      const uint32_t byte = static_cast<uint32_t>(shift[t]) >> 3, both = byte | (byte + 4u) << 4;
      const uint32_t low = prmt(words[0], words[1], both);
      const uint32_t high = prmt(words[2], words[3], both);
      return (prmt(low, high, 0x5410) >> (shift[t] & 4)) & 0x0f0f0f0fu;
    }
  }
  // Selectors of both tokens' 16 channels of code word `pair`: [token][even, odd channels], 8
  // nibbles each.
  __device__ void select(int pair, uint32_t (&selectors)[2][2]) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      // Byte g: the four signs of group g, in bits 0 to 3; then in bits 2, 3, 6, 7.
      const uint32_t signs = tile_signs(t, pair);
      const uint32_t spread = signs * 4u + (signs & 0x0c0c0c0cu) * 12u;
      const auto codes = static_cast<uint32_t>(levels[t] >> (32 * pair));
      selectors[t][0] = (codes & 0x33333333u) | (spread & 0x44444444u);
      selectors[t][1] = (codes >> 2 & 0x33333333u) | (spread >> 1 & 0x44444444u);
    }
  }
  // One k-step of an A fragment: `half` picks the lower or upper four nibbles of the selectors.
  __device__ static void look_up(const uint32_t (&selectors)[2][2], int half, uint32_t negative,
                                 uint32_t positive, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t s = selectors[i % 2][i / 2];
      a[i] = prmt(negative, positive, half == 0 ? s : s >> 16);
    }
  }
};

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_WARP_ROWS_CUH_
