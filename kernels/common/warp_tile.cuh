// A warp's tile of K or V: rows of 32 tokens (16 from D = 128 on) brought into shared memory with
// 16-byte asynchronous copies, then one token per thread (a token to two threads from D = 128 on).
//
// A thread that holds a row or half of one needs next to no shuffles for the rotation, for sums
// over channels or for packing codes, and its numbers are independent of each other. Two threads
// share a token of 128 channels because a whole one leaves room for 12 warps on an SM, too few: on
// an H100 the schedulers of such kernels issued in 58% of their cycles.
//
//   shared   | row of token 0 | 16 bytes | row of token 1 | 16 bytes | ...
//
// The padding makes the stride an odd number of 16-byte chunks: 8 threads that read the same chunk
// of 8 rows hit all 32 banks.
#ifndef SIKV_KERNELS_COMMON_WARP_TILE_CUH_
#define SIKV_KERNELS_COMMON_WARP_TILE_CUH_

#include "kernels/common/async_copy.cuh"
#include "kernels/common/thread_cache.cuh"
#include "plugins/sdk/finite.h"

namespace sikv::cuda {

// How a row [D] is spread over threads.
template <int D>
struct TokenShape {
  static constexpr int kParts = D >= 128 ? 2 : 1;  // neighbouring threads that share a token
  static constexpr int kChannels = D / kParts;     // of one thread
  static constexpr int kTokens = 32 / kParts;      // of one warp

  // Channel of a thread's number i. Parts take turns by groups of 4, so that nibbles stay whole and
  // halves fold within a thread.
  __host__ __device__ static constexpr int channel(int i, int part) {
    return kParts == 1 ? i : i / 4 * 8 + part * 4 + i % 4;
  }
};

inline constexpr int kTilePadding = 16;  // bytes

__host__ __device__ constexpr int tile_row_bytes(int head_dim, int32_t dtype) {
  return head_dim * sikv_dtype_bytes(dtype) + kTilePadding;
}
template <int D>
__host__ __device__ constexpr int tile_bytes(int32_t dtype) {
  return TokenShape<D>::kTokens * tile_row_bytes(D, dtype);
}

// Whether rows can be copied 16 bytes at a time. Host.
inline bool is_aligned(const sikv_rows& rows) {
  const int64_t bytes = sikv_dtype_bytes(rows.dtype);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.token_stride * bytes % 16 == 0 &&
         rows.head_stride * bytes % 16 == 0;
}

// First byte of token t of (sequence b, head h).
__device__ inline const uint8_t* row_address(const sikv_rows& rows, int64_t first, int64_t t,
                                             int h) {
  const int64_t element = (first + t) * rows.token_stride + h * rows.head_stride;
  return static_cast<const uint8_t*>(rows.data) + element * sikv_dtype_bytes(rows.dtype);
}

// Rows of a tile in memory: token t of the tile at first + t * stride.
struct TileSource {
  const uint8_t* first;
  int64_t stride;  // bytes
  bool aligned;    // to 16 bytes
};

// Starts to copy tokens [begin, end) of the warp's tile. Rows that lie across 16-byte bounds are
// copied at once, an element at a time.
template <int D, int kBytes>
__device__ inline void stage_tile_of(const TileSource& source, int begin, int end, uint8_t* tile,
                                     int lane) {
  constexpr int kChunks = D * kBytes / 16, kStride = D * kBytes + kTilePadding;
  constexpr int kTokens = TokenShape<D>::kTokens;
  if (!source.aligned) {
    for (int token = begin; token < end; ++token) {
      const uint8_t* from = source.first + token * source.stride;
      for (int i = lane; i < D; i += 32) {
        if constexpr (kBytes == 4) {
          reinterpret_cast<uint32_t*>(tile + token * kStride)[i] =
              reinterpret_cast<const uint32_t*>(from)[i];
        } else {
          reinterpret_cast<uint16_t*>(tile + token * kStride)[i] =
              reinterpret_cast<const uint16_t*>(from)[i];
        }
      }
    }
  } else if constexpr (32 % kChunks == 0) {
    // A lane copies the same chunk of every row it comes to.
    constexpr int kStep = 32 / kChunks;
    const int first = lane / kChunks, chunk = lane % kChunks;
    const uint8_t* from = source.first + first * source.stride + chunk * 16;
    uint8_t* to = tile + first * kStride + chunk * 16;
    if (begin == 0 && end == kTokens) {
#pragma unroll 4
      for (int i = 0; i < kTokens; i += kStep) {
        copy_async_16(to + i * kStride, from);
        from += kStep * source.stride;
      }
    } else {
      for (int i = 0; i < kTokens; i += kStep) {
        if (first + i >= begin && first + i < end) copy_async_16(to + i * kStride, from);
        from += kStep * source.stride;
      }
    }
  } else {
#pragma unroll 2
    for (int i = lane; i < kTokens * kChunks; i += 32) {
      const int token = i / kChunks, chunk = i % kChunks;
      if (token >= begin && token < end) {
        copy_async_16(tile + token * kStride + chunk * 16,
                      source.first + token * source.stride + chunk * 16);
      }
    }
  }
}
template <int D>
__device__ inline void stage_tile(int32_t dtype, const TileSource& source, int begin, int end,
                                  uint8_t* tile, int lane) {
  if (dtype == SIKV_FP32) {
    stage_tile_of<D, 4>(source, begin, end, tile, lane);
  } else {
    stage_tile_of<D, 2>(source, begin, end, tile, lane);
  }
}

// Starts to copy `count` rows that lie anywhere: lane t has the position of token t. All lanes take
// part.
template <int D>
__device__ inline void stage_scattered(int32_t dtype, const TileSource& source, int32_t position,
                                       int count, uint8_t* tile, int lane) {
  const int bytes = D * sikv_dtype_bytes(dtype), step = source.aligned ? 16 : 2;
  const int per_row = bytes / step;
  for (int first = 0; first < TokenShape<D>::kTokens * per_row; first += 32) {
    const int token = (first + lane) / per_row, at = (first + lane) % per_row * step;
    const int32_t from = __shfl_sync(~0u, position, token);
    if (token >= count) continue;
    uint8_t* to = tile + token * tile_row_bytes(D, dtype) + at;
    const uint8_t* row = source.first + from * source.stride + at;
    if (source.aligned) {
      copy_async_16(to, row);
    } else {
      *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(row);
    }
  }
}

// ---- a thread's numbers -------------------------------------------------------------------------

// Keeps the largest |x| of packed numbers; a NaN stays. sm_80 has the instruction for both types.
template <typename T>
struct LargestOf;
// Every finite fp16 is storable: sums of x * 0, which inf and NaN turn into NaN.
template <>
struct LargestOf<__half> {
  __half2 zeros = __half2{__half{}, __half{}};
  __device__ void see(uint32_t pair) {
    zeros = __hfma2(reinterpret_cast<const __half2&>(pair), __half2{__half{}, __half{}}, zeros);
  }
  __device__ bool storable() const {
    return __low2float(zeros) == 0.0f && __high2float(zeros) == 0.0f;
  }
};
template <>
struct LargestOf<__nv_bfloat16> {
  __nv_bfloat162 largest = __nv_bfloat162{__nv_bfloat16{}, __nv_bfloat16{}};
  __device__ void see(uint32_t pair) {
    const uint32_t magnitude = pair & 0x7fff7fffu;
    largest = __hmax2_nan(largest, reinterpret_cast<const __nv_bfloat162&>(magnitude));
  }
  __device__ bool storable() const {
    return is_storable(__low2float(largest)) && is_storable(__high2float(largest));
  }
};
template <>
struct LargestOf<float> {
  uint32_t largest = 0;  // by bits NaN is above inf is above the rest
  __device__ void see(uint32_t bits) { largest = max(largest, bits & 0x7fffffffu); }
  __device__ bool storable() const { return is_storable(__uint_as_float(largest)); }
};

// The numbers in one 32-bit word.
template <typename T>
__device__ inline void unpack_word(uint32_t word, float* x) {
  if constexpr (std::is_same_v<T, float>) {
    x[0] = __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __half>) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
    x[0] = pair.x, x[1] = pair.y;
  } else {
    x[0] = __uint_as_float(word << 16), x[1] = __uint_as_float(word & 0xffff0000u);
  }
}
template <typename T>
inline constexpr int kPerWord = 4 / sizeof(T);

// x [kChannels] <- a thread's part of a row in shared memory; false if not all are storable.
template <int D, typename T>
__device__ inline bool load_row_of(const uint8_t* row, int part, float* x) {
  using Shape = TokenShape<D>;
  LargestOf<T> largest;
  // Bytes that lie together: the whole row, or 4 numbers.
  constexpr int kPiece = Shape::kParts == 1 ? 16 : 4 * sizeof(T);
  constexpr int kNumbers = kPiece / sizeof(T);
#pragma unroll
  for (int i = 0; i < Shape::kChannels; i += kNumbers) {
    uint32_t words[kPiece / 4];
    const uint8_t* from = row + Shape::channel(i, part) * static_cast<int>(sizeof(T));
    if constexpr (kPiece == 16) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      words[0] = v.x, words[1] = v.y;
    }
#pragma unroll
    for (int w = 0; w < kPiece / 4; ++w) {
      largest.see(words[w]);
      unpack_word<T>(words[w], x + i + w * kPerWord<T>);
    }
  }
  return largest.storable();
}
template <int D>
__device__ inline bool load_row(int32_t dtype, const uint8_t* row, int part, float* x) {
  if (dtype == SIKV_FP16) return load_row_of<D, __half>(row, part, x);
  if (dtype == SIKV_BF16) return load_row_of<D, __nv_bfloat16>(row, part, x);
  return load_row_of<D, float>(row, part, x);
}

// One number of a row, in shared or global memory.
__device__ inline float load_number(int32_t dtype, const uint8_t* row, int i) {
  if (dtype == SIKV_FP16) return __half2float(reinterpret_cast<const __half*>(row)[i]);
  if (dtype == SIKV_BF16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[i]);
  return reinterpret_cast<const float*>(row)[i];
}

// Position in the sequence of an encoded slot.
__device__ inline int position_of(const sikv_cache_view& view, int row, int slot) {
  return view.positions == nullptr
             ? slot
             : view.positions[int64_t{row} * view.max_pages * SIKV_PAGE_TOKENS + slot];
}

// Reports the first number of a row [n] that is not storable, if any.
__device__ inline void report_row(const sikv_cache_view& view, sikv_fault_what what, int b, int h,
                                  int position, int32_t dtype, const uint8_t* row, int n) {
  for (int d = 0; d < n; ++d) {
    const float x = load_number(dtype, row, d);
    if (!is_storable(x)) return report_fault(view, what, b, h, position, d, x);
  }
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_WARP_TILE_CUH_
