// fp32 steps that come out the same in every variant: IEEE, rounded one by one, summed in one
// order.
//
// nvcc fuses a * b + c where it can and a SIMD sum has its own order; either changes a code now and
// then. Whatever decides a stored bit is therefore written with these.
#ifndef SIKV_PLUGINS_LAYOUTS_ARITHMETIC_H_
#define SIKV_PLUGINS_LAYOUTS_ARITHMETIC_H_

#include <math.h>

#include "plugins/abi/sikv_dtype.h"

namespace sikv {

// Largest head_dim; sizes the scratch rows on the stack.
inline constexpr int kMaxHeadDim = 256;

SIKV_INLINE float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

SIKV_INLINE float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SIKV_INLINE float div_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

SIKV_INLINE float sqrt_rn(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return sqrtf(a);
#endif
}

// Sum of x [n], overwriting x: while n is even the upper half is added to the lower one, then what
// is left (1 number; 3 for n = 96) is added from the left. Whole vectors or lanes fold at once.
SIKV_INLINE float sum_folded(float* x, int n) {
  while (n % 2 == 0) {
    n /= 2;
    for (int i = 0; i < n; ++i) x[i] = add_rn(x[i], x[i + n]);
  }
  float sum = x[0];
  for (int i = 1; i < n; ++i) sum = add_rn(sum, x[i]);
  return sum;
}

// Of x [head_dim]; the squares are summed by sum_folded.
SIKV_INLINE float norm_of(const float* x, int head_dim) {
  float square[kMaxHeadDim] = {};
  for (int d = 0; d < head_dim; ++d) square[d] = mul_rn(x[d], x[d]);
  return sqrt_rn(sum_folded(square, head_dim));
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_LAYOUTS_ARITHMETIC_H_
