// The rotation of rot_lm (plugins/layouts/rotation.h) and folded sums (arithmetic.h) over a row
// that one or two threads hold in registers, with the reference's order of additions.
#ifndef SIKV_KERNELS_COMMON_THREAD_ROTATION_CUH_
#define SIKV_KERNELS_COMMON_THREAD_ROTATION_CUH_

#include <type_traits>

#include "kernels/common/warp_tile.cuh"
#include "plugins/layouts/rotation.h"

namespace sikv::cuda {

// Butterflies at distance kHalf between channels.
template <int D, int kHalf>
__device__ inline void butterflies(int part, float (&x)[TokenShape<D>::kChannels]) {
  using Shape = TokenShape<D>;
  if constexpr (Shape::kParts == 2 && kHalf == 4) {
#pragma unroll
    for (int i = 0; i < Shape::kChannels; ++i) {
      // The product is exact, so this is the sum or the difference, rounded once.
      x[i] = __fmaf_rn(x[i], part == 0 ? 1.0f : -1.0f, __shfl_xor_sync(~0u, x[i], 1));
    }
  } else {
    // Distance between the thread's numbers.
    constexpr int kStep = Shape::kParts == 2 && kHalf > 4 ? kHalf / 2 : kHalf;
#pragma unroll
    for (int i = 0; i < Shape::kChannels; ++i) {
      if ((i & kStep) != 0) continue;
      const float lower = x[i], upper = x[i + kStep];
      x[i] = add_rn(lower, upper);
      x[i + kStep] = add_rn(lower, -upper);
    }
  }
}

template <int D, int kHalf = 1>
__device__ inline void hadamard(int part, float (&x)[TokenShape<D>::kChannels]) {
  constexpr int kBlock = rotation::block(D);
  if constexpr (kHalf < kBlock) {
    butterflies<D, kHalf>(part, x);
    hadamard<D, 2 * kHalf>(part, x);
  } else {
    constexpr float kNorm = rotation::norm(kBlock);
#pragma unroll
    for (int i = 0; i < TokenShape<D>::kChannels; ++i) {
      x[i] = __fmaf_rn(x[i], kNorm, 0.0f);  // the product, with 0 for -0
    }
  }
}

// For rotate_centred: -s_d mean_d of channel d, s the rotation's signs.
__device__ inline float flipped_mean(float mean, int d) {
  return rotation::sign(d) < 0.0f ? mean : -mean;
}

// x <- R (x - mean), `flipped` [D] in shared memory the flipped means. A zero may come out with the
// other sign than the reference's, which nothing that is stored can tell.
template <int D>
__device__ inline void rotate_centred(const float* flipped, int part,
                                      float (&x)[TokenShape<D>::kChannels]) {
  using Shape = TokenShape<D>;
  const float turn = part == 0 ? 1.0f : -1.0f;
#pragma unroll
  for (int i = 0; i < Shape::kChannels; i += 4) {
    const float4 m = *reinterpret_cast<const float4*>(flipped + Shape::channel(i, part));
    const float means[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // Exact products: s x - s mean, rounded once.
      const float first = rotation::sign(Shape::channel(i + k, 0));
      const float second = rotation::sign(Shape::channel(i + k, Shape::kParts - 1));
      x[i + k] = __fmaf_rn(x[i + k], first == second ? first : first * turn, means[k]);
    }
  }
  hadamard<D>(part, x);
}

// ---- folded sums --------------------------------------------------------------------------------

// What sum_folded has at a thread's number i once folding has come down to kLeft numbers of a row
// whose numbers are term(0) .. term(kCount - 1); each term is asked for once.
template <int kCount, int kLeft, typename Term>
__device__ inline auto folded(int i, const Term& term) {
  if constexpr (kLeft == kCount) {
    return term(i);
  } else {
    const auto lower = folded<kCount, 2 * kLeft>(i, term);
    return lower + folded<kCount, 2 * kLeft>(i + kLeft, term);
  }
}

// Terms are floats or pairs that are added with add_rn.
struct RoundedSum {
  float value;
  __device__ RoundedSum operator+(RoundedSum other) const { return {add_rn(value, other.value)}; }
  __device__ RoundedSum across() const { return {__shfl_xor_sync(~0u, value, 1)}; }
};
struct RoundedSums {
  float a, b;
  __device__ RoundedSums operator+(RoundedSums other) const {
    return {add_rn(a, other.a), add_rn(b, other.b)};
  }
  __device__ RoundedSums across() const {
    return {__shfl_xor_sync(~0u, a, 1), __shfl_xor_sync(~0u, b, 1)};
  }
};

// sum_folded over the row; both threads of a token get it.
template <int D, typename Term>
__device__ inline auto fold_row(const Term& term) {
  using Shape = TokenShape<D>;
  constexpr int kCount = Shape::kChannels;
  if constexpr (Shape::kParts == 2) {  // the distance of 4 channels lies between the threads
    auto v0 = folded<kCount, 4>(0, term), v1 = folded<kCount, 4>(1, term);
    auto v2 = folded<kCount, 4>(2, term), v3 = folded<kCount, 4>(3, term);
    v0 = v0 + v0.across(), v1 = v1 + v1.across();
    v2 = v2 + v2.across(), v3 = v3 + v3.across();
    return (v0 + v2) + (v1 + v3);
  } else if constexpr (D % 3 == 0) {  // 3 are left of 96
    const auto v0 = folded<kCount, 3>(0, term), v1 = folded<kCount, 3>(1, term);
    return (v0 + v1) + folded<kCount, 3>(2, term);
  } else {
    return folded<kCount, 1>(0, term);
  }
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_THREAD_ROTATION_CUH_
