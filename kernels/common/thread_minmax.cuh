// Min-max groups (plugins/layouts/minmax.h) of a row that one or two threads hold, with the
// reference's bytes, and their way back.
//
// 2-bit codes need no division: code = round((x - zero) / scale) passes 1 where the quotient is
// above 0.5, 2 from 1.5 on, 3 above 2.5, and scale has 11 bits at most, so its products with these
// are exact (kernels/common/simd_minmax.h has the argument). Wider codes divide by multiply-adds.
#ifndef SIKV_KERNELS_COMMON_THREAD_MINMAX_CUH_
#define SIKV_KERNELS_COMMON_THREAD_MINMAX_CUH_

#include "kernels/common/thread_pack.cuh"
#include "kernels/common/warp_decode.cuh"
#include "kernels/common/warp_encode.cuh"
#include "plugins/layouts/minmax.h"

namespace sikv::cuda {

// Groups of channels are found from units of 16, the smallest.
inline constexpr int kUnitChannels = 16;

struct MinMaxParams {
  int group;            // channels: 16, 32, 64 or 128
  int32_t scale_dtype;  // fp16, fp8_e4m3 or fp8_e5m2
};

// low and high of the thread's units of 16 channels, [D / 16].
template <int D>
__device__ inline void find_extremes(const float (&x)[TokenShape<D>::kChannels],
                                     float (&low)[D / kUnitChannels],
                                     float (&high)[D / kUnitChannels]) {
  constexpr int kOwn = kUnitChannels / TokenShape<D>::kParts;  // numbers of a unit
#pragma unroll
  for (int u = 0; u < D / kUnitChannels; ++u) {
    low[u] = high[u] = x[u * kOwn];
#pragma unroll
    for (int k = 1; k < kOwn; ++k) {
      low[u] = fminf(low[u], x[u * kOwn + k]);
      high[u] = fmaxf(high[u], x[u * kOwn + k]);
    }
    if constexpr (TokenShape<D>::kParts == 2) {
      low[u] = fminf(low[u], __shfl_xor_sync(~0u, low[u], 1));
      high[u] = fmaxf(high[u], __shfl_xor_sync(~0u, high[u], 1));
    }
  }
}

// The pair of a group as stored: scale in the low half.
struct StoredRange {
  float scale, zero;
  uint32_t pair;
};
template <int kBits>
__device__ inline StoredRange store_range(float low, float high, int32_t dtype) {
  constexpr float kTop = static_cast<float>((1 << kBits) - 1), kPart = 1.0f / kTop;
  const float range = divide(__fsub_rn(high, low), kTop, kPart);
  const Narrowed scale = narrow(add_rn(range, 0.0f), dtype),
                 zero = narrow(add_rn(low, 0.0f), dtype);
  return {scale.value, zero.value, scale.bits | zero.bits << (dtype == SIKV_FP16 ? 16 : 8)};
}

// Codes and scales of one token; x [kChannels] is the thread's part of the row, low and high are
// what find_extremes found. All threads of the warp take part.
template <int D, int kBits>
__device__ inline void pack_minmax(const Token& token, const MinMaxParams& params,
                                   const float (&x)[TokenShape<D>::kChannels],
                                   float (&low)[D / kUnitChannels],
                                   float (&high)[D / kUnitChannels], uint8_t* codes_to,
                                   uint8_t* scales_to) {
  using Shape = TokenShape<D>;
  constexpr int kUnits = D / kUnitChannels;
  constexpr int kOwn = kUnitChannels / TokenShape<D>::kParts;
#pragma unroll
  for (int span = 1; span < 8; span *= 2) {
    if (kUnitChannels * span < params.group) {
#pragma unroll
      for (int u = 0; u + span < kUnits; ++u) {
        if ((u & span) != 0) continue;
        low[u] = low[u + span] = fminf(low[u], low[u + span]);
        high[u] = high[u + span] = fmaxf(high[u], high[u + span]);
      }
    }
  }

  // Of two threads that share a token each makes the ranges of its half of the row. A group's first
  // unit makes its range; low and high are the group's in all of its units.
  constexpr int kSpan = kUnits / Shape::kParts;
  // Rows of fp16 scales in groups of 32 are written at once.
  const bool wide = D == 128 && params.group == 32 && params.scale_dtype == SIKV_FP16;
  uint32_t pairs[2] = {};
  StoredRange ranges[Shape::kParts] = {};
  CodeStream<D, kBits> codes;
#pragma unroll
  for (int u = 0; u < kSpan; ++u) {
    if (u == 0 || (kUnitChannels * u & (params.group - 1)) == 0) {
      const bool second = token.part == 1;
      const StoredRange mine =
          store_range<kBits>(second ? low[u + kUnits - kSpan] : low[u],
                             second ? high[u + kUnits - kSpan] : high[u], params.scale_dtype);
      if constexpr (Shape::kParts == 2) {
        StoredRange other{};
        other.scale = __shfl_xor_sync(~0u, mine.scale, 1);
        other.zero = __shfl_xor_sync(~0u, mine.zero, 1);
        ranges[0] = second ? other : mine, ranges[1] = second ? mine : other;
      } else {
        ranges[0] = mine;
      }
      pairs[u / 2 % 2] = mine.pair;
      const int first = kUnitChannels * (u + token.part * kSpan);
      if (!wide && token.valid && (first & (params.group - 1)) == 0) {
        const int pair = first / params.group;
        if (params.scale_dtype == SIKV_FP16) {
          reinterpret_cast<uint32_t*>(scales_to)[pair] = mine.pair;
        } else {
          reinterpret_cast<uint16_t*>(scales_to)[pair] = static_cast<uint16_t>(mine.pair);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < Shape::kParts; ++half) {
      const int from = (u + half * kSpan) * kOwn;
      const StoredRange& range = ranges[half];
      if constexpr (kBits == 2) {
        const float scale = range.scale == 0.0f ? INFINITY : range.scale;  // 0 gives code 0
        const float quarter = 0.5f * scale, middle = 1.5f * scale, top = 2.5f * scale;
#pragma unroll
        for (int k = from; k < from + kOwn; ++k) {
          const float offset = __fsub_rn(x[k], range.zero);
          const bool upper = offset >= middle;
          codes.set_bit(k, 1, upper);
          codes.set_bit(k, 0, offset > (upper ? top : quarter));
        }
      } else {
        constexpr float kTop = static_cast<float>((1 << kBits) - 1);
        const float reciprocal = __frcp_rn(range.scale);
#pragma unroll
        for (int k = from; k < from + kOwn; ++k) {
          // A scale of 0 makes the quotient NaN, which fmaxf turns into 0.
          const float position = divide(__fsub_rn(x[k], range.zero), range.scale, reciprocal);
          const float clamped = fminf(fmaxf(position, 0.0f), kTop);
          // To nearest, ties to even: floats from 2^23 on are integers.
          codes.set(k, __float_as_uint(add_rn(clamped, 8388608.0f)) & ((1u << kBits) - 1u));
        }
      }
    }
  }
  codes.store(codes_to, token.part, token.valid);
  if constexpr (D == 128) {
    if (wide && token.valid) {
      reinterpret_cast<uint2*>(scales_to)[token.part] = make_uint2(pairs[0], pairs[1]);
    }
  }
}

// The pair of group `group` of a token's scale row.
__device__ inline minmax::Range load_range(const uint8_t* row, int32_t dtype, int group) {
  if (dtype == SIKV_FP16) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2*>(row)[group]);
    return {pair.x, pair.y};
  }
  return minmax::load_range(row, dtype, group);
}

// Channels 4 g .. 4 g + 3 of a token whose codes and scales begin at these bytes.
template <int kBits>
__device__ inline float4 unpack_minmax(const uint8_t* codes, const uint8_t* scales,
                                       const MinMaxParams& params, int g) {
  const minmax::Range range = load_range(scales, params.scale_dtype, 4 * g / params.group);
  const uint32_t word = load_codes<kBits>(codes, g);
  const auto value = [&](int i) { return minmax::value_of(code_of<kBits>(word, i), range); };
  return make_float4(value(0), value(1), value(2), value(3));
}

// ---- rows in the input type ---------------------------------------------------------------------

// Copies the valid rows of the warp's tile as they came to a PER_TOKEN plane of the same type.
template <int D>
__device__ inline void copy_tile(const Token& token, int32_t dtype, uint8_t* page) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row_bytes = D * sikv_dtype_bytes(dtype), chunks = row_bytes / 16;
  const int first_slot = token.slot - lane / TokenShape<D>::kParts;  // of the tile
  for (int i = lane; i < TokenShape<D>::kTokens * chunks; i += 32) {
    const int t = i / chunks, chunk = i % chunks;
    if (t < token.valid_begin || t >= token.valid_end) continue;
    *reinterpret_cast<uint4*>(page + row_bytes * (first_slot + t) + chunk * 16) =
        *reinterpret_cast<const uint4*>(token.tile + t * token.tile_stride + chunk * 16);
  }
}

// Channels 4 g .. 4 g + 3 of a row in the input type.
__device__ inline float4 load_channels(const uint8_t* row, int32_t dtype, int g) {
  if (dtype == SIKV_FP32) return reinterpret_cast<const float4*>(row)[g];
  const uint2 words = reinterpret_cast<const uint2*>(row)[g];
  float x[4];
  if (dtype == SIKV_FP16) {
    unpack_word<__half>(words.x, x), unpack_word<__half>(words.y, x + 2);
  } else {
    unpack_word<__nv_bfloat16>(words.x, x), unpack_word<__nv_bfloat16>(words.y, x + 2);
  }
  return make_float4(x[0], x[1], x[2], x[3]);
}

// ---- formats of rows without side tables --------------------------------------------------------

// Values in min-max groups: intq and the values of kivi.
template <int D, int kBits>
struct MinMaxFormat {
  static constexpr int kDim = D;
  static constexpr int kTableFloats = 0;
  Plane code, scale;
  MinMaxParams params;
  int scale_bytes;  // of a token

  __device__ void load_tables(const sikv_cache_view&, int, int, float*) const {}
  __device__ void encode(const Token& token, const float*,
                         float (&x)[TokenShape<D>::kChannels]) const {
    float low[D / kUnitChannels], high[D / kUnitChannels];
    find_extremes<D>(x, low, high);
    pack_minmax<D, kBits>(token, params, x, low, high,
                          code.page(token.page) + CodeStream<D, kBits>::kRowBytes * token.slot,
                          scale.page(token.page) + scale_bytes * token.slot);
  }
  __device__ float4 decode(int, int64_t page, int token, int g) const {
    return unpack_minmax<kBits>(code.page(page) + D * kBits / 8 * token,
                                scale.page(page) + scale_bytes * token, params, g);
  }
  __device__ void finish(int, int, float4 (&)[LaneShape<D>::kPerLane]) const {}
};

// Rows as they came.
template <int D>
struct RawFormat {
  static constexpr int kDim = D;
  static constexpr int kTableFloats = 0;
  Plane rows;
  int32_t dtype;

  __device__ void load_tables(const sikv_cache_view&, int, int, float*) const {}
  __device__ void encode(const Token& token, const float*,
                         float (&)[TokenShape<D>::kChannels]) const {
    copy_tile<D>(token, dtype, rows.page(token.page));
  }
  __device__ float4 decode(int, int64_t page, int token, int g) const {
    return load_channels(rows.page(page) + D * sikv_dtype_bytes(dtype) * token, dtype, g);
  }
  __device__ void finish(int, int, float4 (&)[LaneShape<D>::kPerLane]) const {}
};

// body(format) with the MinMaxFormat of one of the listed numbers of bits.
template <int D, int kBits, int... kMore, typename Body>
void with_minmax_format(int bits, Plane code, Plane scale, const MinMaxParams& params,
                        int scale_bytes, const Body& body) {
  if constexpr (sizeof...(kMore) > 0) {
    if (bits != kBits) {
      return with_minmax_format<D, kMore...>(bits, code, scale, params, scale_bytes, body);
    }
  }
  body(MinMaxFormat<D, kBits>{code, scale, params, scale_bytes});
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_THREAD_MINMAX_CUH_
