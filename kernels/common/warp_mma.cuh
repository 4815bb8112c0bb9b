// Tensor-core products of one warp (sm_80 and newer), and fp32 numbers as sums of narrow ones.
//
// Fragments of m16n8k16 (two 16-bit numbers a register) and m16n8k32 (four 8-bit ones), with
// r = lane / 4, j = lane % 4, and w = 2 or 4 numbers a register:
//   A   a0: row r, k = w j ..    a1: row r + 8    a2: row r, k = 4 w + w j ..    a3: row r + 8
//   B   b0: column r, k = w j .. b1: k = 4 w + w j ..
//   C   c0, c1: row r, columns 2 j, 2 j + 1       c2, c3: row r + 8
#ifndef SIKV_KERNELS_COMMON_WARP_MMA_CUH_
#define SIKV_KERNELS_COMMON_WARP_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sikv::cuda {

// The four bytes of {a, b} that the low four nibbles of `selector` name; without the masking that
// __byte_perm does to selectors.
__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// c += a b of fp32 numbers whose low 13 bits are zero (tf32: all of fp16 and bf16), m16n8k8:
//   A   a0: row r, k = j    a1: row r + 8    a2: row r, k = 4 + j    a3: row r + 8
//   B   b0: column r, k = j    b1: k = 4 + j
// Truncates as mma_16bit does.
__device__ inline void mma_tf32(float (&c)[4], const float (&a)[4], float2 b) {
  const auto bits = [](float x) { return __float_as_uint(x); };
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(bits(a[0])), "r"(bits(a[1])), "r"(bits(a[2])), "r"(bits(a[3])), "r"(bits(b.x)),
        "r"(bits(b.y)));
}

// What tf32 holds of x; x - of_tf32(x) is held up to 2^-22 of x.
__device__ inline float of_tf32(float x) {
  return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

// c += a b, exact in int32.
__device__ inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint2 b) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// c += a b of T = __half or __nv_bfloat16, accumulated in fp32. The unit truncates where fp32 adds
// would round: keep chains short and add their results outside.
template <typename T>
__device__ inline void mma_16bit(float (&c)[4], const uint32_t (&a)[4], uint2 b);
template <>
__device__ inline void mma_16bit<__half>(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
template <>
__device__ inline void mma_16bit<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// Terms of T that hold an fp32 number to 22 bits or better.
template <typename T>
inline constexpr int kTerms = sizeof(T) == 4 ? 1 : 3;
template <>
inline constexpr int kTerms<__half> = 2;

// (x, y) rounded to T, packed; x and y become what is left.
template <typename T>
__device__ inline uint32_t take_term(float& x, float& y);
template <>
__device__ inline uint32_t take_term<__half>(float& x, float& y) {
  const __half2 h = __floats2half2_rn(x, y);
  const float2 f = __half22float2(h);
  x -= f.x;
  y -= f.y;
  return *reinterpret_cast<const uint32_t*>(&h);
}
template <>
__device__ inline uint32_t take_term<__nv_bfloat16>(float& x, float& y) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(&h);
  x -= __uint_as_float(bits << 16);
  y -= __uint_as_float(bits & 0xffff0000u);
  return bits;
}

// One column's numbers x [4] (k = 2j, 2j + 1, 8 + 2j, 9 + 2j) as B fragments whose sum they are.
template <typename T>
__device__ inline void split_terms(float (&x)[4], uint2 (&b)[kTerms<T>]) {
#pragma unroll
  for (int i = 0; i < kTerms<T>; ++i) {
    b[i].x = take_term<T>(x[0], x[1]);
    b[i].y = take_term<T>(x[2], x[3]);
  }
}

// A C fragment's columns as B fragments need them: from c (rows are k = tokens, columns heads) the
// four numbers of head `lane / 4` at tokens 2j, 2j + 1, 8 + 2j, 9 + 2j.
__device__ inline void transpose_fragment(const float (&c)[4], float (&x)[4]) {
  const int lane = threadIdx.x % 32;
  const int head = lane / 4, token = 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int from = 4 * (token + i % 2) + head / 2;
    const float even = __shfl_sync(0xffffffffu, c[i / 2 * 2], from);
    const float odd = __shfl_sync(0xffffffffu, c[i / 2 * 2 + 1], from);
    x[i] = head % 2 != 0 ? odd : even;
  }
}

// The same of four heads: c of heads 2 (j % 2) and the next, of token r, for j >= 2 of r + 8; the
// four numbers of head `lane / 4` % 4.
__device__ inline void transpose_fragment(const float (&c)[2], float (&x)[4]) {
  const int lane = threadIdx.x % 32;
  const int head = lane / 4 % 4, token = 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int from = 4 * (token + i % 2) + i / 2 * 2 + head / 2;
    const float even = __shfl_sync(0xffffffffu, c[0], from);
    const float odd = __shfl_sync(0xffffffffu, c[1], from);
    x[i] = head % 2 != 0 ? odd : even;
  }
}

// Such c from a C fragment of eight columns, of which the last four count for nothing.
__device__ inline void pack_four(const float (&eight)[4], float (&c)[2]) {
  const bool second = (threadIdx.x & 2u) != 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float other = __shfl_xor_sync(0xffffffffu, eight[i + 2], 2);
    c[i] = second ? other : eight[i];
  }
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_WARP_MMA_CUH_
