// Decode of rot_lm: a lane looks up 4 channels, the lanes of a slot undo the rotation.
#ifndef SIKV_CODECS_ROT_LM_ROT_LM_DECODE_CUH_
#define SIKV_CODECS_ROT_LM_ROT_LM_DECODE_CUH_

#include "codecs/rot_lm/rot_lm_cuda.h"
#include "kernels/common/warp_decode.cuh"
#include "plugins/layouts/rlm4_v1.h"

namespace sikv::cuda {

template <int D, int kBits, bool kKeys>
struct RotLmDecode {
  static constexpr int kDim = D;
  static constexpr int kCodeBits = kKeys ? kBits - 1 : kBits;
  RotLmPlanes planes;

  __device__ float4 decode(int, int64_t page, int token, int g) const {
    const bool lines = kKeys && planes.line > 0;
    const uint8_t* row = planes.code.page(page) + (lines ? planes.line : D * kCodeBits / 8) * token;
    const float scale = __half2float(
        *reinterpret_cast<const __half*>(planes.scale.page(page) + planes.scale_stride() * token));
    const uint32_t codes = load_codes<kCodeBits>(row, g);
    constexpr uint32_t kLevels = rlm4::num_levels(kBits);
    uint32_t nibble = 0;
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = code_of<kCodeBits>(codes, i);
      float level = rlm4::level_value(kBits, 0);
#pragma unroll
      for (uint32_t k = 1; k < kLevels; ++k) {
        if (code % kLevels == k) level = rlm4::level_value(kBits, static_cast<int>(k));
      }
      x[i] = mul_rn(level, scale);
      if constexpr (!kKeys) nibble |= (code >> (kBits - 1) & 1u) << i;
    }
    if constexpr (kKeys) {
      nibble = lines ? row[rlm4::line_signs(D) + g / 2] >> (g % 2 * 4) & 15u
                     : load_nibble<D>(planes.index.page(page), token, g);
    }
    return apply_nibble(make_float4(x[0], x[1], x[2], x[3]), nibble);
  }

  __device__ void finish(int row, int lane, float4 (&x)[LaneShape<D>::kPerLane]) const {
    unrotate_lanes<D>(lane, x);
    const auto* mean = reinterpret_cast<const float4*>(planes.mean + int64_t{row} * D);
#pragma unroll
    for (int p = 0; p < LaneShape<D>::kPerLane; ++p) x[p] = add_each(x[p], mean[lane + 32 * p]);
  }
};

}  // namespace sikv::cuda

#endif  // SIKV_CODECS_ROT_LM_ROT_LM_DECODE_CUH_
