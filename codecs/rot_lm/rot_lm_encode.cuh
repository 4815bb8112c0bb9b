// Encode of rot_lm: centre and rotate, r, levels and signs, scale.
//
// At D = 128 and 3 bits a channel costs 33 instructions, 8 of them the rotation and 12 level,
// value and the two sums of the scale. Levels need no division per channel: |y| / r, rounded, is
// above a boundary where |y| is above a limit that belongs to (r, boundary), found among the floats
// next to their product (rot_lm_cpu.cc says why these are enough).
#ifndef SIKV_CODECS_ROT_LM_ROT_LM_ENCODE_CUH_
#define SIKV_CODECS_ROT_LM_ROT_LM_ENCODE_CUH_

#include "codecs/rot_lm/rot_lm_cuda.h"
#include "kernels/common/thread_pack.cuh"
#include "kernels/common/thread_rotation.cuh"
#include "kernels/common/warp_encode.cuh"
#include "kernels/common/warp_nibbles.cuh"
#include "plugins/layouts/rlm4_v1.h"

namespace sikv::cuda {

// The largest float whose quotient by r, rounded, is not above `boundary`; infinite for r = 0.
// `reciprocal` is 1 / r, rounded.
__device__ inline float level_limit(float r, float reciprocal, float boundary) {
  if (!(r > 0.0f)) return INFINITY;
  const float near = mul_rn(r, boundary);
  const float below = __uint_as_float(__float_as_uint(near) - 1u);
  const float above = __uint_as_float(__float_as_uint(near) + 1u);
  const bool ordinary = r >= 0x1p-90f && r <= 0x1p90f;  // for divide
  const auto quotient = [&](float x) { return ordinary ? divide(x, r, reciprocal) : div_rn(x, r); };
  if (quotient(above) <= boundary) return above;
  return quotient(near) <= boundary ? near : below;
}

// Halves the limits of kCount levels' ends and the levels' values until one value is left; tells
// set(k, bit) the bits of its level from the highest down. 8 instructions for 4 levels, where
// trying every limit takes 9.
template <int kCount, typename Set>
__device__ inline float descend(float magnitude, const float (&limits)[kCount],
                                const float (&values)[kCount + 1], const Set& set) {
  constexpr int kHalf = kCount / 2, kBit = kCount == 1 ? 0 : kCount == 3 ? 1 : 2;
  const bool above = magnitude > limits[kHalf];
  set(kBit, above);
  if constexpr (kCount == 1) {
    return above ? values[1] : values[0];
  } else {
    float half_limits[kHalf], half_values[kHalf + 1];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) half_limits[i] = above ? limits[kHalf + 1 + i] : limits[i];
#pragma unroll
    for (int i = 0; i <= kHalf; ++i) half_values[i] = above ? values[kHalf + 1 + i] : values[i];
    return descend<kHalf>(magnitude, half_limits, half_values, set);
  }
}
template <int kBits, typename Set>
__device__ inline float find_level(float magnitude,
                                   const float (&limits)[rlm4::num_levels(kBits) - 1],
                                   const Set& set) {
  constexpr int kLevels = rlm4::num_levels(kBits);
  float values[kLevels];
#pragma unroll
  for (int i = 0; i < kLevels; ++i) values[i] = rlm4::level_value(kBits, i);
  return descend<kLevels - 1>(magnitude, limits, values, set);
}

// kKeys: signs go to the index plane and levels to the magnitudes; else both into the value codes.
template <int D, int kBits, bool kKeys>
struct RotLmFormat {
  using Shape = TokenShape<D>;
  static constexpr int kDim = D;
  static constexpr int kTableFloats = D;

  RotLmPlanes planes;

  __device__ void load_tables(const sikv_cache_view&, int row, int lane, float* tables) const {
    for (int d = lane; d < D; d += 32) {
      tables[d] = flipped_mean(planes.mean[int64_t{row} * D + d], d);
    }
  }

  __device__ void encode(const Token& token, const float* mean,
                         float (&y)[Shape::kChannels]) const {
    constexpr int kBoundaries = rlm4::num_levels(kBits) - 1;
    constexpr int kCodeBits = kKeys ? kBits - 1 : kBits;
    rotate_centred<D>(mean, token.part, y);

    const RoundedSum squares = fold_row<D>([&](int i) { return RoundedSum{mul_rn(y[i], y[i])}; });
    // By a power of two division is a product.
    constexpr float kCount = static_cast<float>(D);
    const float r = sqrt_rn((D & (D - 1)) == 0 ? mul_rn(squares.value, 1.0f / kCount)
                                               : div_rn(squares.value, kCount));
    const float reciprocal = __frcp_rn(r);
    float limit[kBoundaries];
#pragma unroll
    for (int k = 0; k < kBoundaries; ++k) {
      limit[k] = level_limit(r, reciprocal, rlm4::level_boundary(kBits, k));
    }

    TokenSigns<D> signs;
    if constexpr (kKeys) {
      // A tiny negative product is -0 still, which counts as positive. There are none in fp16: its
      // numbers are multiples of 2^-24, means of up to 2^20 of them at least 2^-44, and what comes
      // out of both is a multiple of 2^-68.
      if (token.dtype != SIKV_FP16) {
#pragma unroll
        for (int i = 0; i < Shape::kChannels; ++i) y[i] = add_rn(y[i], 0.0f);
      }
      signs.set(y);
      if (kBits == rlm4::kLineKeyBits && planes.line > 0) {
        CodeStream<D, 1> own_signs;
        set_signs(y, own_signs);
        own_signs.store(
            planes.code.page(token.page) + planes.line * token.slot + rlm4::line_signs(D),
            token.part, token.valid);
      }
    }
    CodeStream<D, kCodeBits> codes;
    const RoundedSums sums = fold_row<D>([&](int i) {
      const float magnitude = fabsf(y[i]);
      const float value =
          find_level<kBits>(magnitude, limit, [&](int k, bool bit) { codes.set_bit(i, k, bit); });
      if constexpr (!kKeys) codes.set_bit(i, kBits - 1, y[i] >= 0.0f);
      return RoundedSums{mul_rn(magnitude, value), mul_rn(value, value)};
    });

    constexpr int kRowBytes = CodeStream<D, kCodeBits>::kRowBytes;
    uint8_t* const row = planes.code.page(token.page) +
                         (kKeys && planes.line > 0 ? planes.line : kRowBytes) * token.slot;
    codes.store(row, token.part, token.valid);
    if constexpr (kKeys) {
      signs.store(planes.index.page(token.page), token.slot, token.part, token.valid);
    }
    if (token.valid && token.part == 0) {
      const float scale = r > 0.0f ? div_rn(sums.a, sums.b) : 0.0f;
      *reinterpret_cast<uint16_t*>(planes.scale.page(token.page) +
                                   planes.scale_stride() * token.slot) =
          static_cast<uint16_t>(narrow_fp16(scale).bits);
    }
  }

 private:
  // As TokenSigns::set, in the order of the channels.
  __device__ static void set_signs(const float (&y)[Shape::kChannels], CodeStream<D, 1>& signs) {
#pragma unroll
    for (int w = 0; w < CodeStream<D, 1>::kWords; ++w) {
      uint32_t negative = 0;
#pragma unroll
      for (int bit = 31; bit >= 0; --bit) {
        negative = __funnelshift_l(__float_as_uint(y[32 * w + bit]), negative, 1);
      }
      signs.words[w] = ~negative;
    }
  }
};

}  // namespace sikv::cuda

#endif  // SIKV_CODECS_ROT_LM_ROT_LM_ENCODE_CUH_
