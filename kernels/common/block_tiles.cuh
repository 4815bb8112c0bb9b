// Splits of encoded tokens on the tensor cores, 16 tokens x 8 query heads a warp and step, straight
// from the planes to registers: no shared memory, no copy of a decoded token.
//
//   S = K q      A: tokens x channels (a tile's keys), B: channels x heads
//   out = V^T P  A: channels x tokens (its values), B: tokens x heads, fp32 weights as sums of
//   16-bit
//                terms
//
// Both products leave heads 2 j, 2 j + 1 to lane % 4 = j, so rescaling needs no exchange. Which
// channel is which row or k of a fragment is free; it is chosen so that a lane loads neighbouring
// bytes. Results are within a few of fp32's last bits.
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
__device__ inline void rescale_add(float (&acc)[4], const float (&t)[4], const float (&u)[4],
                                   const float (&f)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = fmaf(acc[i], f[i % 2], t[i] + u[i]);
}

// ---- keys ---------------------------------------------------------------------------------------

// Codes: see KeyTile.
template <TileKeys kKeys>
struct CodeKeys {
  static constexpr int kDim = kTileDim;
  // Loaded while the values before them are worked on, places looked up a tile ahead, slots two: 64
  // rows of 2048 tokens take 28.6 us for 29.2.
  static constexpr bool kAhead = true;
  using Shared = TileQuery;

  // Head `n` of 8 of tile t, which is query head g of the row or, for g = -1, none; returns what is
  // missing from its logits. One warp; a barrier must follow.
  __device__ static float prepare(const FlashCall& call, int row, int g, int n, Shared& shared) {
    if (g < 0) {
      clear_tile_query(n, shared);
      return 0.0f;
    }
    float q[kDim / 32];
    const float shift = prepare_query(call, row, g, q);
    store_tile_query<kKeys>(q, n, shared);
    return shift;
  }
  __device__ void init(const FlashCall&, int) {}
  // Half 0 and half 1 of what a token takes.
  __device__ static void prefetch(const RowStore& keys, int64_t page, int token, int half) {
    if constexpr (KeyTile<kKeys>::kLines) {
      if (half == 0) touch_l2(keys.payload.page(page) + KeyTile<kKeys>::kLine * token);
      return;
    }
    touch_l2(keys.index.page(page) + kDim * (token / nibble_tile::kTileTokens) + 64 * half);
    if (half == 0) {
      touch_l2(keys.payload.page(page) + 32 * token);
    } else {
      constexpr int kScaleBytes = has_levels(kKeys) ? 2 : 16;
      touch_l2(keys.scale.page(page) + kScaleBytes * token);
    }
  }
  __device__ void load(const RowStore& keys, int i, int64_t page, int token) {
    tile.load(keys, i, page, token);
  }
  __device__ void score(const FlashCall&, const Shared& shared, int, float (&c)[4]) const {
    tile.score(shared, c);
  }

  KeyTile<kKeys> tile;
};

// Rows of T = __half or __nv_bfloat16, which the view's dtype is too.
template <typename T, int kD, int kHeadTiles>
struct RawKeys {
  static constexpr int kDim = kD, kChunks = kD / 32;  // of 32 channels, 8 a lane
  static constexpr bool kAhead = false;  // too many registers: 1639 us for 1432, 64 rows of 128K
  struct Shared {};

  // Rows are read one after the other: nothing to gain.
  __device__ static void prefetch(const RowStore&, int64_t, int, int) {}
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
  static constexpr float kUnit = 1.0f / kGain;
  template <int kHeadTiles>
  struct Extra {};

  __device__ static void prefetch(const RowStore&, int64_t, int, int) {}
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
  template <int kHeadTiles>
  __device__ void add(float (&x)[kHeadTiles][4], const float (&f)[kHeadTiles][2],
                      float (&acc)[kHeadTiles][kTiles][4], Extra<kHeadTiles>&) const {
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
  __device__ void finish(float (&)[kHeadTiles][kTiles][4], const Extra<kHeadTiles>&) const {}

  uint32_t words[4][kChunks][kWords];
};

// 2-bit codes as two bits of +-1 each: value = high * weight_1 + low * weight_0 (+ middle). Exact
// in bf16, whose range also holds any weight times scale; three terms keep fp32's digits.
//
// Bit `bit` of the lower and the upper half of x, as a pair of +-magnitude (0x3f80: 1, 0x3f00:
// 1/2).
template <uint32_t kMagnitude>
__device__ inline uint32_t sign_pair(uint32_t x, int bit) {
  constexpr uint32_t kNegative = (0x8000u | kMagnitude) * 0x10001u;
  return ((x << (15 - bit)) & 0x80008000u) ^ kNegative;
}

// rlm4v of 2 bits, D = 128. With the sign s and b = s xnor level: value = (s +- 1)(v1 + v0) / 2 +
// (b +- 1)(v1 - v0) / 2.
struct LevelValues {
  static constexpr int kTiles = kTileDim / 16;
  static constexpr float kUnit = 1.0f;
  template <int kHeadTiles>
  struct Extra {};

  __device__ static void prefetch(const RowStore& values, int64_t page, int token, int half) {
    if (values.line > 0) {
      if (half == 1) touch_l2(values.payload.page(page) + 32 * token);
      return;
    }
    touch_l2(half == 0 ? values.payload.page(page) + 32 * token
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
  template <int kHeadTiles>
  __device__ void add(float (&x)[kHeadTiles][4], const float (&f)[kHeadTiles][2],
                      float (&acc)[kHeadTiles][kTiles][4], Extra<kHeadTiles>&) const {
    using T = __nv_bfloat16;
    constexpr float kHigh = (rlm4::level_value(2, 1) + rlm4::level_value(2, 0)) / 2;
    constexpr float kLow = (rlm4::level_value(2, 1) - rlm4::level_value(2, 0)) / 2;
    uint2 high[kHeadTiles][kTerms<T>], low[kHeadTiles][kTerms<T>];
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight =
            x[t][i] * __half2float(__ushort_as_half(static_cast<unsigned short>(scale[i])));
        x[t][i] = weight * kHigh;
        y[i] = weight * kLow;
      }
      split_terms<T>(x[t], high[t]);
      split_terms<T>(y, low[t]);
    }
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t same = ~(words[i] ^ words[i] >> 1);
      bits[i] = (words[i] & 0xaaaaaaaau) | (same & 0x55555555u);
    }
    const uint32_t pairs[4] = {prmt(bits[0], bits[1], 0x5410), prmt(bits[0], bits[1], 0x7632),
                               prmt(bits[2], bits[3], 0x5410), prmt(bits[2], bits[3], 0x7632)};
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      uint32_t a_high[4], a_low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a_high[i] = sign_pair<0x3f80>(pairs[i], 2 * m + 1);
        a_low[i] = sign_pair<0x3f80>(pairs[i], 2 * m);
      }
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        // Two chains of products, for latency.
        float sum[4] = {}, other[4] = {};
#pragma unroll
        for (int i = kTerms<T> - 1; i >= 0; --i) {
          mma_16bit<T>(other, a_low, low[t][i]);
          mma_16bit<T>(sum, a_high, high[t][i]);
        }
        rescale_add(acc[t][m], sum, other, f[t]);
      }
    }
  }
  template <int kHeadTiles>
  __device__ void finish(float (&)[kHeadTiles][kTiles][4], const Extra<kHeadTiles>&) const {}

  uint32_t words[4], scale[4];
};

// intq and kiviv of 2 bits, fp16 scales a 32 channels, D = 128: value = (2 code - 3) scale / 2 +
// (zero + 3/2 scale). The middle, one number a group and token, is summed beside the products.
struct MinMaxValues {
  static constexpr int kTiles = kTileDim / 16, kGroups = kTileDim / 32;
  static constexpr float kUnit = 1.0f;
  template <int kHeadTiles>
  struct Extra {
    float middle[kHeadTiles][kGroups] = {};  // of head r, this lane's tokens
  };

  __device__ static void prefetch(const RowStore& values, int64_t page, int token, int half) {
    touch_l2(half == 0 ? values.payload.page(page) + 32 * token
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
  template <int kHeadTiles>
  __device__ void add(float (&x)[kHeadTiles][4], const float (&f)[kHeadTiles][2],
                      float (&acc)[kHeadTiles][kTiles][4], Extra<kHeadTiles>& extra) const {
    using T = __nv_bfloat16;
    const int lane = threadIdx.x % 32;
    float down[kHeadTiles];  // f of head r
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      const float even = __shfl_sync(0xffffffffu, f[t][0], lane / 8);
      const float odd = __shfl_sync(0xffffffffu, f[t][1], lane / 8);
      down[t] = lane / 4 % 2 != 0 ? odd : even;
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint2 b[kHeadTiles][kTerms<T>];
      float range[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = g == 0   ? scale[i].x
                              : g == 1 ? scale[i].y
                              : g == 2 ? scale[i].z
                                       : scale[i].w;
        const float2 p = __half22float2(*reinterpret_cast<const __half2*>(&pair));
        range[i][0] = p.x;
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
        extra.middle[t][g] = fmaf(extra.middle[t][g], down[t], middle);
        split_terms<T>(weight, b[t]);
      }
      // Lower half: token 2 j (8 + 2 j), upper half: the one behind it.
      const uint32_t first = bytes[0][g] | static_cast<uint32_t>(bytes[1][g]) << 16;
      const uint32_t second = bytes[2][g] | static_cast<uint32_t>(bytes[3][g]) << 16;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t a_high[4], a_low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t pair = i < 2 ? first : second;
          const int bit = 2 * (2 * n + i % 2);
          a_high[i] = sign_pair<0x3f80>(pair, bit + 1);
          a_low[i] = sign_pair<0x3f00>(pair, bit);
        }
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
          float sum[4] = {}, other[4] = {};
#pragma unroll
          for (int i = kTerms<T> - 1; i >= 0; --i) {
            mma_16bit<T>(other, a_low, b[t][i]);
            mma_16bit<T>(sum, a_high, b[t][i]);
          }
          rescale_add(acc[t][2 * g + n], sum, other, f[t]);
        }
      }
    }
  }
  template <int kHeadTiles>
  __device__ void finish(float (&acc)[kHeadTiles][kTiles][4],
                         const Extra<kHeadTiles>& extra) const {
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
  __device__ void prefetch(const FlashCall& call) const {
    const int64_t page = place >> 8;
    const int token = static_cast<int>(place & 255u), half = static_cast<int>(threadIdx.x) / 16 % 2;
    Keys::prefetch(call.keys, page, token, half);
    Values::prefetch(call.values, page, token, half);
  }
  template <typename Visit>
  __device__ void visit(int n, Visit&& visit) const {
    const uint32_t at = __shfl_sync(0xffffffffu, place, n);
    visit(int64_t{at >> 8}, static_cast<int>(at & 255u));
  }
};

// The running softmax of a warp over tiles of 16 tokens.
template <typename Keys, typename Values, int kHeadTiles>
class TileFlash {
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
    const int r = threadIdx.x % 32 / 4;
    float weight[kHeadTiles][4], f[kHeadTiles][2];
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      float c[4];
      keys.score(call, query[t], t, c);
      if (t == kHeadTiles - 1) scored();
      if ((counts >> r & 1u) == 0) c[0] = c[1] = -INFINITY;
      if ((counts >> (r + 8) & 1u) == 0) c[2] = c[3] = -INFINITY;
      float top[2] = {fmaxf(c[0], c[2]), fmaxf(c[1], c[3])};
#pragma unroll
      for (int o = 4; o < 32; o *= 2) {
        top[0] = fmaxf(top[0], __shfl_xor_sync(0xffffffffu, top[0], o));
        top[1] = fmaxf(top[1], __shfl_xor_sync(0xffffffffu, top[1], o));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float m = fmaxf(top[i], m_[t][i]);
        const float zero = m == -INFINITY ? 0.0f : m;
        f[t][i] = exp2_approx(m_[t][i] - zero);
        m_[t][i] = m;
        c[i] = exp2_approx(c[i] - zero);
        c[i + 2] = exp2_approx(c[i + 2] - zero);
        l_[t][i] = fmaf(l_[t][i], f[t][i], c[i] + c[i + 2]);
      }
      transpose_fragment(c, weight[t]);
    }
    values.template add<kHeadTiles>(weight, f, acc_, extra_);
  }

  __device__ void store(const WarpStates& states, int group, const Values& values) {
    wait_touches();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, j = lane % 4;
    values.template finish<kHeadTiles>(acc_, extra_);
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int o = 4; o < 32; o *= 2) l_[t][i] += __shfl_xor_sync(0xffffffffu, l_[t][i], o);
        const int g = 8 * t + 2 * j + i, state = warp * states.heads + g;
        if (g >= group) continue;
        if (r == 0) states.tops[state] = {m_[t][i], l_[t][i]};
        float* const sums = states.sums + state * (16 * Values::kTiles);
#pragma unroll
        for (int n = 0; n < Values::kTiles / 2; ++n) {
          const auto sum = [&](int c) {
            const TileHalf from = Values::at(n, c);
            return acc_[t][from.tile][i + 2 * from.half] * Values::kUnit;
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

  TileFlash<Keys, Values, kHeadTiles> flash;
  while (base < range.end) {
    if (base + kStep < range.end) next.prefetch<Keys, Values>(call);
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
  flash.store(states, call.group, values);
  __syncthreads();
  store_split(call, row, split, 0, call.group, states);
}

// Split `part` of the exact rows, of T = __half or __nv_bfloat16, as states in `shared`. A call, so
// that its registers do not weigh on the encoded splits' loop.
template <typename T, int kDim, int kHeadTiles>
__device__ __noinline__ void attend_exact_tiles(const FlashCall& call, int row, int part,
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

// Blocks a multiprocessor holds at once: rows of 256 channels take more registers.
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
  finish_row(call, row, static_cast<int>(gridDim.x), reinterpret_cast<float*>(shared));
}

template <typename Keys, typename Values, int kHeadTiles>
void launch_attend_tiles(const FlashCall& call, cudaStream_t stream) {
  constexpr int kDim = Keys::kDim;
  constexpr size_t kSplit = tile_split_bytes<Keys, kHeadTiles>();
  constexpr size_t kAlone = std::max(kSplit, flash_shared_bytes(4, kDim));
  constexpr size_t kJoint = std::max(kSplit + WarpStates::bytes(8 * kHeadTiles, kDim), kAlone);
  const auto kernel = attend_tiles<Keys, Values, kHeadTiles>;
  if constexpr (kJoint > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kJoint)),
          "cudaFuncSetAttribute of attend_tiles");
  }
  const dim3 grid(static_cast<unsigned>(call.joint ? call.encoded_splits : call.splits()),
                  static_cast<unsigned>(call.view.num_sequences * call.view.num_kv_heads));
  launch_overlapped("attend_tiles", kernel, grid, kFlashThreads, call.joint ? kJoint : kAlone,
                    stream, call);
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_BLOCK_TILES_CUH_
