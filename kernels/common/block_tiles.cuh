// Splits of encoded tokens on the tensor cores, 16 tokens x 8 query heads a warp and step, straight
// from the planes to registers: no shared memory, no copy of a decoded token.
//
//   S = K q      A: tokens x channels (a tile's keys), B: channels x heads
//   out = V^T P  A: channels x tokens (its values), B: tokens x heads, fp32 weights as sums of
//                16-bit terms
//
// Both products leave heads 2 j, 2 j + 1 to lane % 4 = j, so rescaling needs no exchange. Of up to
// four heads a product has two parts of each: digits of the query (FourQueries), terms of the
// weights; columns 2 j and 2 j + 1 then are heads 2 (j % 2) and the next. Which channel is which
// row or k of a fragment is free; it is chosen so that a lane loads neighbouring bytes. Results are
// within a few of fp32's last bits.
#ifndef SIKV_KERNELS_COMMON_BLOCK_TILES_CUH_
#define SIKV_KERNELS_COMMON_BLOCK_TILES_CUH_

#include "kernels/common/block_flash.cuh"

namespace sikv::cuda {

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// acc <- acc * f + t, f per column.
__device__ inline void rescale_add(float (&acc)[4], const float (&t)[4], const float (&f)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = fmaf(acc[i], f[i % 2], t[i]);
}
template <int kHeadTiles, int kTiles>
__device__ inline void scale_sums(float (&acc)[kHeadTiles][kTiles][4], float unit) {
#pragma unroll
  for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[t][n][i] *= unit;
    }
  }
}

// ---- keys ---------------------------------------------------------------------------------------

// Codes: see KeyTile. kFour: of rows of up to four query heads.
template <TileKeys kKeys, bool kIsFour>
struct CodeKeys {
  static constexpr int kDim = kTileDim;
  static constexpr bool kFour = kIsFour;
  // Loaded while the values before them are worked on, places looked up a tile ahead, slots two: 64
  // rows of 2048 tokens take 28.6 us for 29.2.
  static constexpr bool kAhead = true;
  static constexpr bool kFourQueries = kFour && has_levels(kKeys);
  using Shared = std::conditional_t<kFourQueries, FourQueries, TileQuery>;

  // Head `n` of 8 of tile t, which is query head g of the row or, for g = -1, none; returns what is
  // missing from its logits. One warp; a barrier must follow.
  __device__ static float prepare(const FlashCall& call, int row, int g, int n, Shared& shared) {
    float q[kDim / 32] = {}, shift = 0.0f;
    if (g >= 0) shift = prepare_query(call, row, g, q);
    if constexpr (kFourQueries) {
      if (n < 4) store_four_query<kKeys>(q, n, shared);
    } else {
      store_tile_query<kKeys>(q, n, shared);
    }
    return shift;
  }
  __device__ void init(const FlashCall&, int) {}
  // Half 0 and half 1 of what a token takes.
  __device__ static void prefetch(const RowStore& keys, int64_t page, int token, int half,
                                  const L2Touch& touch) {
    if constexpr (KeyTile<kKeys>::kLines) {
      constexpr int kLine = KeyTile<kKeys>::kLine;
      touch(keys.payload.page(page) + kLine * token + kLine / 2 * half);
    } else {
      constexpr int kScaleBytes = has_levels(kKeys) ? 2 : 16;
      touch(keys.index.page(page) + kDim * (token / nibble_tile::kTileTokens) + 64 * half);
      touch(half == 0 ? keys.payload.page(page) + 32 * token
                      : keys.scale.page(page) + kScaleBytes * token);
    }
  }
  __device__ void load(const RowStore& keys, int i, int64_t page, int token) {
    tile.load(keys, i, page, token);
  }
  __device__ void score(const FlashCall&, const Shared& shared, int,
                        float (&c)[kFour ? 2 : 4]) const {
    if constexpr (kFour && !kFourQueries) {
      float eight[4];
      tile.score(shared, eight);
      pack_four(eight, c);
    } else {
      tile.score(shared, c);
    }
  }

  KeyTile<kKeys> tile;
};

// Rows of T = __half or __nv_bfloat16, which the view's dtype is too.
template <typename T, int kD, int kHeadTiles>
struct RawKeys {
  static constexpr bool kFour = false;
  static constexpr int kDim = kD, kChunks = kD / 32;  // of 32 channels, 8 a lane
  static constexpr bool kAhead = false;  // too many registers: 1639 us for 1432, 64 rows of 128K
  struct Shared {};

  // Rows are read one after the other: nothing to gain.
  __device__ static void prefetch(const RowStore&, int64_t, int, int, const L2Touch&) {}
  __device__ static float prepare(const FlashCall&, int, int, int, Shared&) { return 0.0f; }
  // B fragments: the very bytes of the queries.
  __device__ void init(const FlashCall& call, int row) {
    const int group = call.group;
    const int r = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      const int g = 8 * t + r;
      const uint4* q = reinterpret_cast<const uint4*>(static_cast<const T*>(call.q) +
                                                      call.head(row, g < group ? g : 0) * kD);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) query[t][i] = g < group ? q[4 * i + j] : uint4{};
    }
  }
  __device__ void load(const RowStore& keys, int i, int64_t page, int token) {
    load_row(i, keys.payload.page(page) + token * static_cast<int>(kD * sizeof(T)));
  }
  __device__ void load_row(int i, const uint8_t* row) {
    const uint4* from = reinterpret_cast<const uint4*>(row) + threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kChunks; ++n) words[i][n] = __ldg(from + 4 * n);
  }
  __device__ void score(const FlashCall& call, const Shared&, int t, float (&c)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      const uint4 &x = words[0][n], &y = words[1][n], &q = query[t][n];
      mma_16bit<T>(c, {x.x, y.x, x.y, y.y}, {q.x, q.y});
      mma_16bit<T>(c, {x.z, y.z, x.w, y.w}, {q.z, q.w});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] *= call.scale;
  }

  uint4 words[2][kChunks], query[kHeadTiles][kChunks];
};

// ---- values -------------------------------------------------------------------------------------
//
// A lane holds tokens 2 j, 2 j + 1, 8 + 2 j, 9 + 2 j (i = 0 .. 3). x [4]: their weights for head r.
// Its channels come as kTiles / 2 runs of 4: the first channel of a run, and which half of which
// tile each of its channels is.

struct TileHalf {
  int tile, half;
};

template <typename T, int kD>
struct RawValues {
  static constexpr int kWords = kD % 64 == 0 ? 4 : 2;  // a lane loads of a chunk
  static constexpr int kChunks = kD / (16 * kWords), kTiles = kD / 16;
  // Weights reach down to 2^-24 / kGain before fp16 drops them.
  static constexpr float kGain = std::is_same_v<T, __half> ? 1024.0f : 1.0f;
  template <int kHeadTiles>
  struct Extra {};

  __device__ static void prefetch(const RowStore&, int64_t, int, int, const L2Touch&) {}
  static constexpr int kRuns = kWords / 2;  // of a chunk
  __device__ static int run(int n) {
    return n / kRuns * 16 * kWords + 2 * kWords * (threadIdx.x % 32 / 4) + 4 * (n % kRuns);
  }
  static constexpr __device__ TileHalf at(int n, int i) {
    return {n / kRuns * kWords + n % kRuns * 2 + i / 2, i % 2};
  }
  __device__ void load(const RowStore& values, int i, int64_t page, int token) {
    load_row(i, values.payload.page(page) + token * static_cast<int>(kD * sizeof(T)));
  }
  __device__ void load_row(int i, const uint8_t* row) {
    const int r = threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      if constexpr (kWords == 4) {
        const uint4 w = __ldg(reinterpret_cast<const uint4*>(row) + 8 * n + r);
        words[i][n][0] = w.x, words[i][n][1] = w.y, words[i][n][2] = w.z, words[i][n][3] = w.w;
      } else {
        const uint2 w = __ldg(reinterpret_cast<const uint2*>(row) + 8 * n + r);
        words[i][n][0] = w.x, words[i][n][1] = w.y;
      }
    }
  }
  template <bool kFour, int kHeadTiles>
  __device__ void add(float (&x)[kHeadTiles][4], const float (&f)[kHeadTiles][2],
                      float (&acc)[kHeadTiles][kTiles][4], Extra<kHeadTiles>&) const {
    static_assert(!kFour);
    uint2 b[kHeadTiles][kTerms<T>];
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[t][i] *= kGain;
      split_terms<T>(x[t], b[t]);
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int n = m / kWords, w = m % kWords;
      const uint32_t a[4] = {prmt(words[0][n][w], words[1][n][w], 0x5410),
                             prmt(words[0][n][w], words[1][n][w], 0x7632),
                             prmt(words[2][n][w], words[3][n][w], 0x5410),
                             prmt(words[2][n][w], words[3][n][w], 0x7632)};
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        float sum[4] = {};
#pragma unroll
        for (int i = kTerms<T> - 1; i >= 0; --i) mma_16bit<T>(sum, a, b[t][i]);
        rescale_add(acc[t][m], sum, f[t]);
      }
    }
  }
  template <int kHeadTiles>
  __device__ void finish(float (&acc)[kHeadTiles][kTiles][4], const Extra<kHeadTiles>&) const {
    scale_sums(acc, 1.0f / kGain);
  }

  uint32_t words[4][kChunks][kWords];
};

// Encoded values are 2-bit codes that prmt.b32 turns into fp16 numbers, exact integers, and weights
// times scale that are sums of two fp16 terms: to 2^-22 of themselves, or to 2^-40 of the largest
// scale so far. For that, scales are multiplied by a power of two that leaves the largest of a
// warp's tiles below 2^15; sums follow where it changes. (Codes as two bits of +-1 in bf16, whose
// range needs no such care, with weights in three terms took six products for one or two here, and
// 941 instructions a tile for 644.)
class ScaleUnit {
 public:
  // largest: of the tile's scales as fp16 bits, of this lane. Returns what to multiply scales by.
  __device__ float take(uint32_t largest) {
    const uint32_t field = max(field_, __reduce_max_sync(0xffffffffu, largest) >> 10);
    change_ = power(static_cast<int>(field_ - field));
    field_ = field;
    return power(kTop - static_cast<int>(field));
  }
  // What to multiply the sums before this tile by.
  __device__ float change() const { return change_; }
  // What a sum of 1 stands for.
  __device__ float unit() const { return power(static_cast<int>(field_) - kTop); }

 private:
  static constexpr int kTop = 29;  // 2^(field - 14) is above every scale of that exponent field
  __device__ static float power(int exponent) { return __int_as_float((127 + exponent) << 23); }

  uint32_t field_ = 0;
  float change_ = 1.0f;
};

// A column's four weights as B fragments. Of eight heads column n is head n, and each of the two
// terms takes a product; of four, columns n and n + 4 are the terms of head n, and one product
// does.
template <bool kFour>
inline constexpr int kWeightProducts = kFour ? 1 : 2;

template <bool kFour>
__device__ inline void split_weights(float (&x)[4], uint2 (&b)[kWeightProducts<kFour>]) {
  uint2 terms[2];
  split_terms<__half>(x, terms);
  if constexpr (kFour) {
    b[0] = (threadIdx.x & 16u) != 0 ? terms[1] : terms[0];
  } else {
    b[0] = terms[0], b[1] = terms[1];
  }
}

// acc <- acc * f + (tile's codes) (weights).
template <bool kFour>
__device__ inline void add_product(float (&acc)[4], const uint32_t (&codes)[4],
                                   const uint2 (&weights)[kWeightProducts<kFour>],
                                   const float (&f)[2]) {
  float sum[4] = {};
#pragma unroll
  for (int i = kWeightProducts<kFour> - 1; i >= 0; --i) mma_16bit<__half>(sum, codes, weights[i]);
  rescale_add(acc, sum, f);
}

// Bits of a positive integer as fp16, which must hold it: 11 digits.
constexpr uint32_t half_bits(uint32_t integer) {
  uint32_t exponent = 0;
  while (integer >> (exponent + 1) != 0) ++exponent;
  const uint32_t mantissa = integer << 10 >> exponent;
  if (mantissa << exponent >> 10 != integer) throw "not an fp16 number";
  return (15 + exponent) << 10 | (mantissa & 0x3ffu);
}
constexpr uint32_t level_bytes(int shift, uint32_t negative) {
  uint32_t bytes = 0;
  for (int code = 0; code < 4; ++code) {
    const float level = rlm4::level_value(2, code % 2) * 10000.0f + 0.5f;
    const uint32_t byte = half_bits(static_cast<uint32_t>(level)) >> shift & 0xffu;
    bytes |= (byte | (code < 2 ? negative : 0u)) << (8 * code);
  }
  return bytes;
}

// rlm4v of 2 bits, D = 128: levels times 10^4 are fp16 numbers.
struct LevelValues {
  static constexpr int kTiles = kTileDim / 16;
  template <int kHeadTiles>
  struct Extra {
    ScaleUnit unit;
  };

  __device__ static void prefetch(const RowStore& values, int64_t page, int token, int half,
                                  const L2Touch& touch) {
    // In lines the scale lies with the key.
    touch(half == 0 || values.line > 0 ? values.payload.page(page) + 32 * token
                                       : values.scale.page(page) + 2 * token);
  }
  // Word r of a token: channels 16 r .. 16 r + 15, of which half h of tile m is 8 h + m.
  __device__ static int run(int n) { return 16 * (threadIdx.x % 32 / 4) + 4 * n; }
  static constexpr __device__ TileHalf at(int n, int i) { return {n % 2 * 4 + i, n / 2}; }
  __device__ void load(const RowStore& values, int i, int64_t page, int token) {
    const auto* row = reinterpret_cast<const uint32_t*>(values.payload.page(page) + 32 * token);
    words[i] = __ldg(row + threadIdx.x % 32 / 4);
    scale[i] = load_half(values.scale.page(page) + values.scale_stride() * token);
  }
  template <bool kFour, int kHeadTiles>
  __device__ void add(float (&x)[kHeadTiles][4], const float (&f)[kHeadTiles][2],
                      float (&acc)[kHeadTiles][kTiles][4], Extra<kHeadTiles>& extra) const {
    const float gain = extra.unit.take(max(max(scale[0], scale[1]), max(scale[2], scale[3])));
    uint2 weights[kHeadTiles][kWeightProducts<kFour>];
    float down[kHeadTiles][2];
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[t][i] *= gain * __half2float(__ushort_as_half(static_cast<unsigned short>(scale[i])));
      }
      split_weights<kFour>(x[t], weights[t]);
      down[t][0] = f[t][0] * extra.unit.change();
      down[t][1] = f[t][1] * extra.unit.change();
    }
    // Bytes of two tokens side by side: channels 4 n .. + 3 of both in half a register.
    const uint32_t codes[4] = {prmt(words[0], words[1], 0x5140), prmt(words[0], words[1], 0x7362),
                               prmt(words[2], words[3], 0x5140), prmt(words[2], words[3], 0x7362)};
#pragma unroll
    for (int q = 0; q < kTiles / 2; ++q) {
      uint32_t a[2][4];  // of tiles q and q + 4
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Of a code c: its low byte is number c of the table, its high byte number 4 + c.
        const uint32_t selectors = (codes[i] >> (2 * q) & 0x03030303u) * 0x11u + 0x40404040u;
        a[0][i] = prmt(kLowBytes, kHighBytes, selectors);
        a[1][i] = prmt(kLowBytes, kHighBytes, selectors >> 16);
      }
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        add_product<kFour>(acc[t][q], a[0], weights[t], down[t]);
        add_product<kFour>(acc[t][q + 4], a[1], weights[t], down[t]);
      }
    }
  }
  template <int kHeadTiles>
  __device__ void finish(float (&acc)[kHeadTiles][kTiles][4],
                         const Extra<kHeadTiles>& extra) const {
    scale_sums(acc, extra.unit.unit() * 1e-4f);
  }

  uint32_t words[4], scale[4];

 private:
  // Bytes of all codes (sign, 1 where not negative, and level) times 10^4 as fp16.
  static constexpr uint32_t kLowBytes = level_bytes(0, 0), kHighBytes = level_bytes(8, 0x80u);
};

// intq and kiviv of 2 bits, fp16 scales a 32 channels, D = 128: value = (2 code - 3) scale / 2 +
// (zero + 3/2 scale). The middle, one number a group and token, is summed beside the products.
struct MinMaxValues {
  static constexpr int kTiles = kTileDim / 16, kGroups = kTileDim / 32;
  template <int kHeadTiles>
  struct Extra {
    ScaleUnit unit;
    float middle[kHeadTiles][kGroups] = {};  // of head r, this lane's tokens
  };

  __device__ static void prefetch(const RowStore& values, int64_t page, int token, int half,
                                  const L2Touch& touch) {
    touch(half == 0 ? values.payload.page(page) + 32 * token
                    : values.scale.page(page) + 16 * token);
  }
  // Byte r of a group's eight: channels 32 g + 4 r .. + 3. Two tiles a group, so that all rows of a
  // tile have one scale.
  __device__ static int run(int n) { return 32 * n + 4 * (threadIdx.x % 32 / 4); }
  static constexpr __device__ TileHalf at(int n, int i) { return {2 * n + i / 2, i % 2}; }
  __device__ void load(const RowStore& values, int i, int64_t page, int token) {
    const uint8_t* row = values.payload.page(page) + 32 * token + threadIdx.x % 32 / 4;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) bytes[i][g] = __ldg(row + 8 * g);
    scale[i] = __ldg(reinterpret_cast<const uint4*>(values.scale.page(page) + 16 * token));
  }
  template <bool kFour, int kHeadTiles>
  __device__ void add(float (&x)[kHeadTiles][4], const float (&f)[kHeadTiles][2],
                      float (&acc)[kHeadTiles][kTiles][4], Extra<kHeadTiles>& extra) const {
    const int lane = threadIdx.x % 32;
    const float gain = extra.unit.take(largest_scale());
    float down[kHeadTiles][2], middle_down[kHeadTiles];  // the latter f of head r
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      const float even = __shfl_sync(0xffffffffu, f[t][0], lane / 8);
      const float odd = __shfl_sync(0xffffffffu, f[t][1], lane / 8);
      middle_down[t] = lane / 4 % 2 != 0 ? odd : even;
      down[t][0] = f[t][0] * extra.unit.change();
      down[t][1] = f[t][1] * extra.unit.change();
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint2 weights[kHeadTiles][kWeightProducts<kFour>];
      float range[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 p = __half22float2(pair_of(i, g));
        range[i][0] = p.x * gain;
        range[i][1] = fmaf(1.5f, p.x, p.y);
      }
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        float weight[4], middle = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[i] = x[t][i] * range[i][0];
          middle = fmaf(x[t][i], range[i][1], middle);
        }
        extra.middle[t][g] = fmaf(extra.middle[t][g], middle_down[t], middle);
        split_weights<kFour>(weight, weights[t]);
      }
      // Byte i: codes of token i.
      const uint32_t codes = prmt(bytes[0][g] | static_cast<uint32_t>(bytes[1][g]) << 8,
                                  bytes[2][g] | static_cast<uint32_t>(bytes[3][g]) << 8, 0x5410);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Of a code c: its high byte is number c of the table, its low byte number 4.
          const int k = 2 * n + half;
          const uint32_t at = k < 2 ? codes << (4 - 2 * k) : codes >> (2 * k - 4);
          const uint32_t selectors = (at & 0x30303030u) | 0x04040404u;
          a[half] = prmt(kHighBytes, 0u, selectors);
          a[2 + half] = prmt(kHighBytes, 0u, selectors >> 16);
        }
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
          add_product<kFour>(acc[t][2 * g + n], a, weights[t], down[t]);
        }
      }
    }
  }
  template <int kHeadTiles>
  __device__ void finish(float (&acc)[kHeadTiles][kTiles][4],
                         const Extra<kHeadTiles>& extra) const {
    scale_sums(acc, extra.unit.unit() * 0.5f);
    const int j = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float middle = extra.middle[t][g];
        middle += __shfl_xor_sync(0xffffffffu, middle, 1);
        middle += __shfl_xor_sync(0xffffffffu, middle, 2);
        const float even = __shfl_sync(0xffffffffu, middle, 8 * j);
        const float odd = __shfl_sync(0xffffffffu, middle, 8 * j + 4);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[t][2 * g + n][i] += i % 2 == 0 ? even : odd;
        }
      }
    }
  }

  uint8_t bytes[4][kGroups];
  uint4 scale[4];

 private:
  static constexpr uint32_t kHighBytes = 0x423cbcc2u;  // of -3, -1, 1, 3 as fp16

  // Scale and zero of token i of the lane and group g.
  __device__ __half2 pair_of(int i, int g) const {
    const uint32_t pair = g == 0   ? scale[i].x
                          : g == 1 ? scale[i].y
                          : g == 2 ? scale[i].z
                                   : scale[i].w;
    return *reinterpret_cast<const __half2*>(&pair);
  }
  __device__ uint32_t largest_scale() const {
    __half2 largest = pair_of(0, 0);
#pragma unroll
    for (int i = 1; i < 4 * kGroups; ++i) {
      largest = __hmax2(largest, pair_of(i / kGroups, i % kGroups));
    }
    return __half_as_ushort(__low2half(largest));
  }
};

// ---- a split ------------------------------------------------------------------------------------

// Shared memory of a split: its queries, then its warps' states.
template <typename Keys, int kHeadTiles>
constexpr size_t query_bytes() {
  return (sizeof(typename Keys::Shared) * kHeadTiles + 15) / 16 * 16;
}

// The 16 tokens from `first` on, one per lane (twice): page << 8 | token in the page.
struct TilePlaces {
  uint32_t place;
  uint32_t counts;  // bit n: token n counts

  TilePlaces() = default;
  __device__ static int slot_at(const EncodedList& list, int first, int end) {
    const int i = min(first + static_cast<int>(threadIdx.x) % 16, end - 1);
    return list.slots != nullptr ? __ldg(list.slots + i) : i;
  }
  __device__ static int page_of(const FlashCall& call, int row, int slot) {
    return static_cast<int>(page_number(call.view, row, slot / SIKV_PAGE_TOKENS));
  }
  __device__ TilePlaces(const FlashCall& call, int row, const EncodedList& list, int first, int end,
                        int slot, int page) {
    place = static_cast<uint32_t>(page) << 8 | static_cast<uint32_t>(slot % SIKV_PAGE_TOKENS);
    const bool inside = first + static_cast<int>(threadIdx.x) % 16 < end;
    counts = __ballot_sync(0xffffffffu,
                           inside && !(list.skip_pinned && is_pinned(call.view, row, slot)));
  }
  // Starts the way of the tokens' lines from memory to L2: they arrive while another tile is worked
  // on and take no registers. Lanes share a token's lines.
  template <typename Keys, typename Values>
  __device__ void prefetch(const FlashCall& call, const L2Touch& touch) const {
    const int64_t page = place >> 8;
    const int token = static_cast<int>(place & 255u), half = static_cast<int>(threadIdx.x) / 16 % 2;
    Keys::prefetch(call.keys, page, token, half, touch);
    Values::prefetch(call.values, page, token, half, touch);
  }
  template <typename Visit>
  __device__ void visit(int n, Visit&& visit) const {
    const uint32_t at = __shfl_sync(0xffffffffu, place, n);
    visit(int64_t{at >> 8}, static_cast<int>(at & 255u));
  }
};

// The running softmax of a warp over tiles of 16 tokens. A lane has the columns 2 j and 2 j + 1 of
// both products; of four heads (2 j + i) % 4 is the head of column 2 j + i.
template <typename Keys, typename Values, int kHeadTiles>
class TileFlash {
  static constexpr bool kFour = Keys::kFour;
  static_assert(!kFour || kHeadTiles == 1);
  // Logits of a lane, and from which distance on lanes have logits of the same heads.
  static constexpr int kLogits = kFour ? 2 : 4, kSameHeads = kFour ? 2 : 4;

 public:
  __device__ TileFlash() {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) m_[t][i] = -INFINITY, l_[t][i] = 0.0f;
#pragma unroll
      for (int n = 0; n < Values::kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_[t][n][i] = 0.0f;
      }
    }
  }

  // counts: bit n is set where token n of the tile counts. scored(): the keys are no longer needed.
  template <typename Scored>
  __device__ void add(const FlashCall& call, const typename Keys::Shared* query, const Keys& keys,
                      const Values& values, uint32_t counts, Scored&& scored) {
    const int lane = threadIdx.x % 32, r = lane / 4;
    float weight[kHeadTiles][4], f[kHeadTiles][2];
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      float c[kLogits];
      keys.score(call, query[t], t, c);
      if (t == kHeadTiles - 1) scored();
#pragma unroll
      for (int i = 0; i < kLogits; i += 2) {
        const int token = kFour ? r + (lane & 2) * 4 : r + 4 * i;
        if ((counts >> token & 1u) == 0) c[i] = c[i + 1] = -INFINITY;
      }
      float top[2] = {c[0], c[1]};
      if constexpr (!kFour) top[0] = fmaxf(c[0], c[2]), top[1] = fmaxf(c[1], c[3]);
#pragma unroll
      for (int o = kSameHeads; o < 32; o *= 2) {
        top[0] = fmaxf(top[0], __shfl_xor_sync(0xffffffffu, top[0], o));
        top[1] = fmaxf(top[1], __shfl_xor_sync(0xffffffffu, top[1], o));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float m = fmaxf(top[i], m_[t][i]);
        const float zero = m == -INFINITY ? 0.0f : m;
        f[t][i] = exp2_approx(m_[t][i] - zero);
        m_[t][i] = m;
        float sum = c[i] = exp2_approx(c[i] - zero);
        if constexpr (!kFour) sum += c[i + 2] = exp2_approx(c[i + 2] - zero);
        l_[t][i] = fmaf(l_[t][i], f[t][i], sum);
      }
      transpose_fragment(c, weight[t]);
    }
    values.template add<kFour, kHeadTiles>(weight, f, acc_, extra_);
  }

  __device__ void store(const WarpStates& states, int group, const Values& values) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, j = lane % 4;
    if constexpr (kFour) {  // a head's two columns
#pragma unroll
      for (int n = 0; n < Values::kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc_[0][n][i] += __shfl_xor_sync(0xffffffffu, acc_[0][n][i], kSameHeads);
        }
      }
    }
    values.template finish<kHeadTiles>(acc_, extra_);
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int o = kSameHeads; o < 32; o *= 2) {
          l_[t][i] += __shfl_xor_sync(0xffffffffu, l_[t][i], o);
        }
        const int g = 8 * t + 2 * j + i, state = warp * states.heads + g;
        if (g >= group) continue;
        if (r == 0) states.tops[state] = {m_[t][i], l_[t][i]};
        float* const sums = states.sums + state * (16 * Values::kTiles);
#pragma unroll
        for (int n = 0; n < Values::kTiles / 2; ++n) {
          const auto sum = [&](int c) {
            const TileHalf from = Values::at(n, c);
            return acc_[t][from.tile][i + 2 * from.half];
          };
          *reinterpret_cast<float4*>(sums + Values::run(n)) = {sum(0), sum(1), sum(2), sum(3)};
        }
      }
    }
  }

 private:
  float m_[kHeadTiles][2], l_[kHeadTiles][2], acc_[kHeadTiles][Values::kTiles][4];
  typename Values::template Extra<kHeadTiles> extra_;
};

template <typename Keys, typename Values, int kHeadTiles>
__device__ void attend_tile_split(const FlashCall& call, int row, int split, uint8_t* shared) {
  constexpr int kDim = Keys::kDim, kStep = kTileTokens * kFlashWarps;
  auto* const query = reinterpret_cast<typename Keys::Shared*>(shared);
  const WarpStates states(reinterpret_cast<float*>(shared + query_bytes<Keys, kHeadTiles>()),
                          8 * kHeadTiles, kDim);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, j = lane % 4;
  Keys keys;
  Values values;
  const auto prepare = [&](bool any) {  // else the side tables may never have been filled
    if (any) {
      keys.init(call, row);
      for (int n = warp; n < 8 * kHeadTiles; n += kFlashWarps) {
        const float shift = Keys::prepare(call, row, n < call.group ? n : -1, n % 8, query[n / 8]);
        if (lane == 0) states.shift[n] = shift;
      }
    } else if (threadIdx.x < 8 * kHeadTiles) {
      states.shift[threadIdx.x] = 0.0f;
    }
  };
  if constexpr (Keys::kAhead) prepare(call.view.encoded_len[row] > 0);
  // The last block needs it for the merge: 0.2 us of 28 at 8 rows.
  if (call.values.rotated() && 32 * threadIdx.x < kDim) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(call.values.mean + int64_t{row} * kDim +
                                                  32 * threadIdx.x));
  }
  wait_for_launch_before();
  const EncodedList list(call, row);
  const Range range = part_of(list.count, split, call.encoded_splits, kTileTokens);
  int base = range.begin + warp * kTileTokens;

  const auto load_keys = [&](const TilePlaces& places) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      places.visit(r + 8 * i,
                   [&](int64_t page, int token) { keys.load(call.keys, i, page, token); });
    }
  };
  const auto load_values = [&](const TilePlaces& places) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      places.visit(2 * j + i % 2 + i / 2 * 8,
                   [&](int64_t page, int token) { values.load(call.values, i, page, token); });
    }
  };
  const auto slot_at = [&](int first) {
    return TilePlaces::slot_at(list, min(first, range.end - 1), range.end);
  };
  const auto places_at = [&](int first, int slot) {
    return TilePlaces(call, row, list, min(first, range.end - 1), range.end, slot,
                      TilePlaces::page_of(call, row, slot));
  };
  uint32_t counts = 0;
  TilePlaces next{};
  [[maybe_unused]] int slot = 0;  // of the tile after the next
  if (base < range.end) {
    const int first = slot_at(base);
    if constexpr (Keys::kAhead) slot = slot_at(base + 2 * kStep);
    const TilePlaces places = places_at(base, first);
    counts = places.counts;
    load_keys(places);
    load_values(places);
    next = places_at(base + kStep, slot_at(base + kStep));
  }
  if constexpr (!Keys::kAhead) prepare(range.begin < range.end);
  __syncthreads();

  const L2Touch touch;
  TileFlash<Keys, Values, kHeadTiles> flash;
  while (base < range.end) {
    if (base + kStep < range.end) next.prefetch<Keys, Values>(call, touch);
    if constexpr (Keys::kAhead) {
      const int page = TilePlaces::page_of(call, row, slot), slot_after = slot_at(base + 3 * kStep);
      // Past the last tile too: a load that may not be is moved once it is there.
      flash.add(call, query, keys, values, counts, [&] { load_keys(next); });
      base += kStep;
      if (base < range.end) {
        counts = next.counts;
        load_values(next);
        next = TilePlaces(call, row, list, base + kStep, range.end, slot, page);
        slot = slot_after;
      }
    } else {
      flash.add(call, query, keys, values, counts, [] {});
      base += kStep;
      if (base < range.end) {
        counts = next.counts;
        load_keys(next);
        load_values(next);
        next = places_at(base + kStep, slot_at(base + kStep));
      }
    }
  }
  touch.wait();
  flash.store(states, call.group, values);
  __syncthreads();
  store_split(call, row, split, 0, call.group, states);
}

// Split `part` of the exact rows, of T = __half or __nv_bfloat16, as states in `shared`. Not a
// call: one ahead of the encoded splits' loop makes its loads move their descriptor to uniform
// registers every time, 40 of 769 instructions.
template <typename T, int kDim, int kHeadTiles>
__device__ __forceinline__ void attend_exact_tiles(const FlashCall& call, int row, int part,
                                                   float* shared) {
  using Keys = RawKeys<T, kDim, kHeadTiles>;
  using Values = RawValues<T, kDim>;
  const WarpStates states(shared, 8 * kHeadTiles, kDim);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, j = lane % 4;
  const ExactRows rows(call, row);
  const Range range = part_of(rows.count, part, call.exact_splits, kTileTokens);
  if (threadIdx.x < 8 * kHeadTiles) states.shift[threadIdx.x] = 0.0f;
  for (int g = warp; part == 0 && g < call.group; g += kFlashWarps) {
    float q[kDim / 32];
    warp_load(call.q, call.view.dtype, call.head(row, g) * kDim, kDim, q);
    check_query(call, row, g, q);
  }
  Keys keys;
  Values values;
  keys.init(call, row);
  TileFlash<Keys, Values, kHeadTiles> flash;
  for (int base = range.begin + warp * kTileTokens; base < range.end;
       base += kTileTokens * kFlashWarps) {
    const int last = range.end - 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) keys.load_row(i, rows.k(min(base + r + 8 * i, last)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values.load_row(i, rows.v(min(base + 2 * j + i % 2 + i / 2 * 8, last)));
    }
    const int count = range.end - base;
    const typename Keys::Shared none[kHeadTiles] = {};
    flash.add(call, none, keys, values, count >= kTileTokens ? 0xffffu : (1u << count) - 1u, [] {});
  }
  flash.store(states, call.group, values);
}

// Where the states of exact splits are in a block that has an encoded split too.
template <typename Keys, int kHeadTiles>
constexpr size_t tile_split_bytes() {
  return (query_bytes<Keys, kHeadTiles>() + WarpStates::bytes(8 * kHeadTiles, Keys::kDim) + 15) /
         16 * 16;
}

// Blocks a multiprocessor holds at once: rows of 256 channels take more registers. (Levels would do
// with 128 and a fourth block: 27.5 us for 24.7 at 64 rows of 2048 tokens, 14.6 for 13.4 at 8.)
constexpr int tile_blocks(int dim) { return dim > 128 ? 2 : kResident; }

// Grid (splits, rows).
template <typename Keys, typename Values, int kHeadTiles>
__global__ __launch_bounds__(kFlashThreads, tile_blocks(Keys::kDim)) void attend_tiles(
    const __grid_constant__ FlashCall call) {
  extern __shared__ float4 shared_words[];
  auto* const shared = reinterpret_cast<uint8_t*>(shared_words);
  constexpr int kDim = Keys::kDim;
  const int row = static_cast<int>(blockIdx.y), split = static_cast<int>(blockIdx.x);
  const bool joint = Keys::kAhead && call.joint;
  const int part = joint ? split : split - call.encoded_splits;
  auto* const exact =
      reinterpret_cast<float*>(shared + (joint ? tile_split_bytes<Keys, kHeadTiles>() : 0));
  const auto attend_exact_part = [&] {
    if (call.view.dtype == SIKV_FP16) {
      attend_exact_tiles<__half, kDim, kHeadTiles>(call, row, part, exact);
    } else if (call.view.dtype == SIKV_BF16) {
      attend_exact_tiles<__nv_bfloat16, kDim, kHeadTiles>(call, row, part, exact);
    }
  };
  const auto store_exact_part = [&] {
    wait_for_launch_before();
    if (call.view.dtype != SIKV_FP32) {
      __syncthreads();
      return store_split(call, row, call.encoded_splits + part, 0, call.group,
                         WarpStates(exact, 8 * kHeadTiles, kDim));
    }
    constexpr int kLanes = kDim == 64 ? 8 : kDim == 256 ? 32 : 16, kHeads = 4;
    for (int first = 0; first < call.group; first += kHeads) {
      if (first > 0) __syncthreads();
      attend_exact<kLanes, kHeads>(call, row, part, first, min(kHeads, call.group - first),
                                   reinterpret_cast<float*>(shared));
    }
  };
  if (!call.early) wait_for_launch_before();
  if constexpr (Keys::kAhead) {
    // A block's exact tokens first: they do not wait for the selection.
    if (part >= 0) attend_exact_part();
    if (split < call.encoded_splits) {
      attend_tile_split<Keys, Values, kHeadTiles>(call, row, split, shared);
    }
    if (part >= 0) store_exact_part();
  } else if (part < 0) {
    attend_tile_split<Keys, Values, kHeadTiles>(call, row, split, shared);
  } else {
    attend_exact_part();
    store_exact_part();
  }
  finish_row<kDim / 32>(call, row, static_cast<int>(gridDim.x), reinterpret_cast<float*>(shared));
}

template <typename Keys, typename Values, int kHeadTiles>
void launch_attend_tiles(FlashCall call, cudaStream_t stream) {
  constexpr int kDim = Keys::kDim;
  constexpr size_t kSplit = tile_split_bytes<Keys, kHeadTiles>();
  constexpr size_t kAlone = std::max(kSplit, flash_shared_bytes(4, kDim));
  constexpr size_t kJoint = std::max(kSplit + WarpStates::bytes(8 * kHeadTiles, kDim), kAlone);
  const auto kernel = attend_tiles<Keys, Values, kHeadTiles>;
  const dim3 grid(static_cast<unsigned>(call.joint ? call.encoded_splits : call.splits()),
                  static_cast<unsigned>(call.view.num_sequences * call.view.num_kv_heads));
  const size_t bytes = flash_launch_bytes(call, kernel, call.joint ? kJoint : kAlone, kJoint,
                                          Keys::kAhead ? kMergeBytes : kRowMergeBytes);
  launch_overlapped("attend_tiles", kernel, grid, kFlashThreads, bytes, stream, call);
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_BLOCK_TILES_CUH_
