// One thread's codes on their way to memory: exact quotients without division, streams of b-bit
// codes in registers, words to a token's row.
#ifndef SIKV_KERNELS_COMMON_THREAD_PACK_CUH_
#define SIKV_KERNELS_COMMON_THREAD_PACK_CUH_

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "kernels/common/warp_tile.cuh"
#include "plugins/layouts/minmax.h"

namespace sikv::cuda {

// a / b rounded as __fdiv_rn does, from y = 1 / b correctly rounded: 5 multiply-adds where the
// division takes about 10 instructions and a branch. a * y is off by less than 1.5 ulp, the first
// correction leaves less than one, and the second is exact by Markstein's theorem (a faithful
// quotient corrected by its exact remainder times the correctly rounded reciprocal). Needs b, y and
// products of b with the quotient to be normal numbers and a, if not 0, to be at least 2^-100;
// quotients below 2^-126 may be off.
__device__ inline float divide(float a, float b, float y) {
  float q = __fmul_rn(a, y);
  q = __fmaf_rn(__fmaf_rn(-q, b, a), y, q);
  return __fmaf_rn(__fmaf_rn(-q, b, a), y, q);
}

// A number and what is stored of it: x to a type of scales, saturating.
struct Narrowed {
  uint32_t bits;
  float value;
};

__device__ inline Narrowed narrow_fp16(float x) {
  const __half h = __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
  return {__half_as_ushort(h), __half2float(h)};
}
__device__ inline Narrowed narrow(float x, int32_t dtype) {
  if (dtype == SIKV_FP16) return narrow_fp16(x);
  const bool e4m3 = dtype == SIKV_FP8_E4M3;
#if __CUDA_ARCH__ >= 890
  const __nv_fp8_interpretation_t type = e4m3 ? __NV_E4M3 : __NV_E5M2;
  const __nv_fp8_storage_t bits = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, type);
  return {bits, __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, type)))};
#else
  const uint8_t bits = e4m3 ? sikv_float_to_fp8_e4m3(x) : sikv_float_to_fp8_e5m2(x);
  return {bits, e4m3 ? sikv_fp8_e4m3_to_float(bits) : sikv_fp8_e5m2_to_float(bits)};
#endif
}

// ---- words --------------------------------------------------------------------------------------

// Writes kWords words to `to`, in the widest stores that rows of kRowBytes bytes allow.
template <int kWords, int kRowBytes>
__device__ inline void store_words(uint8_t* to, const uint32_t* words) {
  if constexpr (kRowBytes % 16 == 0 && kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      reinterpret_cast<uint4*>(to)[i / 4] =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  } else if constexpr (kRowBytes % 8 == 0 && kWords % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      reinterpret_cast<uint2*>(to)[i / 2] = make_uint2(words[i], words[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint32_t*>(to)[i] = words[i];
  }
}

// ---- codes --------------------------------------------------------------------------------------

// A thread's codes of kBits bits, a bit stream over its own kChannels numbers; every index is a
// compile-time constant after unrolling.
template <int D, int kBits>
struct CodeStream {
  using Shape = TokenShape<D>;
  static constexpr int kWords = Shape::kChannels * kBits / 32;
  static constexpr int kRowBytes = D * kBits / 8;
  uint32_t words[kWords] = {};

  // Sets number i's code.
  __device__ void set(int i, uint32_t code) {
    const int bit = kBits * i, word = bit / 32, shift = bit % 32;
    words[word] |= code << shift;
    if (shift + kBits > 32) words[word + 1] |= code >> (32 - shift);
  }
  // Sets bit k of number i's code.
  __device__ void set_bit(int i, int k, bool value) {
    const int bit = kBits * i + k;
    if (value) words[bit / 32] |= 1u << (bit % 32);
  }

  // Writes the token's row. Where two threads share a token each sends half of its words to the
  // other and writes half of the row; all threads of the warp take part.
  __device__ void store(uint8_t* row, int part, bool valid) const {
    if constexpr (Shape::kParts == 1) {
      if (valid) store_words<kWords, kRowBytes>(row, words);
    } else {
      uint32_t whole[kWords] = {};
      if constexpr (kBits == 3) {
        merge_by_units(part, whole);
      } else {
#pragma unroll
        for (int j = 0; j < kWords / 2; ++j) {
          const uint32_t low = words[j], high = words[j + kWords / 2];
          const uint32_t mine = part == 0 ? low : high;
          const uint32_t other = __shfl_xor_sync(~0u, part == 0 ? high : low, 1);
          interleave(part == 0 ? mine : other, part == 0 ? other : mine, whole + 2 * j);
        }
      }
      if (valid) store_words<kWords, kRowBytes>(row + part * (kRowBytes / 2), whole);
    }
  }

 private:
  // The groups of part 0 and of part 1 in turns.
  __device__ static void interleave(uint32_t even, uint32_t odd, uint32_t* to) {
    if constexpr (kBits == 1) {
      const auto spread = [](uint32_t x) {  // 4 nibbles to the low halves of 4 bytes
        x = (x | x << 8) & 0x00ff00ffu;
        return (x | x << 4) & 0x0f0f0f0fu;
      };
      to[0] = spread(even & 0xffffu) | spread(odd & 0xffffu) << 4;
      to[1] = spread(even >> 16) | spread(odd >> 16) << 4;
    } else if constexpr (kBits == 2) {
      to[0] = __byte_perm(even, odd, 0x5140), to[1] = __byte_perm(even, odd, 0x7362);
    } else if constexpr (kBits == 4) {
      to[0] = __byte_perm(even, odd, 0x5410), to[1] = __byte_perm(even, odd, 0x7632);
    } else {
      to[0] = even, to[1] = odd;
    }
  }
  // Codes of 4 numbers, those of group u.
  __device__ uint32_t unit(int u) const {
    const int bit = 4 * kBits * u, word = bit / 32, shift = bit % 32;
    uint32_t codes = words[word] >> shift;
    if (shift + 4 * kBits > 32) codes |= words[word + 1] << (32 - shift);
    return codes & ((1u << (4 * kBits & 31)) - 1u);
  }
  // The same a group at a time, for groups that cross words.
  __device__ void merge_by_units(int part, uint32_t (&whole)[kWords]) const {
    constexpr int kUnits = Shape::kChannels / 8;  // that a thread keeps
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const uint32_t low = unit(u), high = unit(u + kUnits);
      const uint32_t mine = part == 0 ? low : high;
      const uint32_t other = __shfl_xor_sync(~0u, part == 0 ? high : low, 1);
      const uint32_t codes = part == 0 ? mine | other << (4 * kBits) : other | mine << (4 * kBits);
      const int bit = 8 * kBits * u, word = bit / 32, shift = bit % 32;
      whole[word] |= codes << shift;
      if (shift + 8 * kBits > 32) whole[word + 1] |= codes >> (32 - shift);
    }
  }
};

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_THREAD_PACK_CUH_
