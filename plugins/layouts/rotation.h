// The fixed rotation of rot_lm: R = blockdiag(H_b) diag(s), orthogonal, so q.k = (Rq).(Rk).
//
//   s_d  +1 if bit 0 of splitmix64(d) is set, else -1
//   H_b  normalised Walsh-Hadamard matrix; b = largest power of two dividing D
//        D = 64 -> 64, 96 -> 32, 128 -> 128, 256 -> 256
//
// Butterflies (x, y) -> (x + y, x - y) at distance 1, 2, 4, ... b/2, then one product with
// 1/sqrt(b), in fp32: the order decides the last bit, so it is part of the layout.
#ifndef SIKV_PLUGINS_LAYOUTS_ROTATION_H_
#define SIKV_PLUGINS_LAYOUTS_ROTATION_H_

#include "plugins/layouts/arithmetic.h"

namespace sikv::rotation {

SIKV_INLINE constexpr int block(int head_dim) { return head_dim & -head_dim; }

// First output of the generator splitmix64 started at `state`.
SIKV_INLINE constexpr uint64_t splitmix64(uint64_t state) {
  uint64_t z = state + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

SIKV_INLINE constexpr float sign(int channel) {
  return (splitmix64(static_cast<uint64_t>(channel)) & 1u) != 0 ? 1.0f : -1.0f;
}

// 1/sqrt(b), correctly rounded: a power of two, times sqrt(1/2) where log2(b) is odd.
SIKV_INLINE constexpr float norm(int block) {
  float norm = 1.0f;
  for (; block >= 4; block /= 4) norm *= 0.5f;
  return block == 2 ? norm * 0.70710678118654752440f : norm;
}

// x <- blockdiag(H_b) x, which is its own inverse.
SIKV_INLINE void hadamard(float* x, int head_dim) {
  const int b = block(head_dim);
  for (int half = 1; half < b; half *= 2) {
    for (int first = 0; first < head_dim; first += 2 * half) {
      for (int i = first; i < first + half; ++i) {
        const float lower = x[i], upper = x[i + half];
        x[i] = add_rn(lower, upper);
        x[i + half] = add_rn(lower, -upper);
      }
    }
  }
  for (int d = 0; d < head_dim; ++d) x[d] = mul_rn(x[d], norm(b));
}

// x [D] <- R x.
SIKV_INLINE void forward(float* x, int head_dim) {
  for (int d = 0; d < head_dim; ++d) x[d] *= sign(d);
  hadamard(x, head_dim);
}

// x [D] <- R^T x.
SIKV_INLINE void inverse(float* x, int head_dim) {
  hadamard(x, head_dim);
  for (int d = 0; d < head_dim; ++d) x[d] *= sign(d);
}

}  // namespace sikv::rotation

#endif  // SIKV_PLUGINS_LAYOUTS_ROTATION_H_
