// Between rot_lm_cuda.cu and the files that hold its kernels for one head_dim each.
#ifndef SIKV_CODECS_ROT_LM_ROT_LM_CUDA_H_
#define SIKV_CODECS_ROT_LM_ROT_LM_CUDA_H_

#include "kernels/common/fit.cuh"
#include "kernels/common/thread_cache.cuh"
#include "plugins/abi/sikv_codec.h"

namespace sikv::cuda {

// Planes and mean of keys (index not null) or values.
struct RotLmPlanes {
  Plane index, code, scale;
  float* mean;  // [B, H, D]
  int line;     // bytes, 0: planes

  // Bytes of a token's scale and whatever lies between it and the next one's.
  __host__ __device__ int scale_stride() const { return line > 0 ? line : 2; }
};

// Launches for head_dim D; the definitions are in rot_lm_launch.cuh.
template <int D>
struct RotLmLaunches {
  static void encode(bool keys, int bits, const sikv_cache_view& view, const sikv_rows& rows,
                     const int32_t* first_slot, const RotLmPlanes& planes, cudaStream_t stream);
  static void decode(bool keys, int bits, const sikv_decode_args& args, const RotLmPlanes& planes,
                     cudaStream_t stream);
  // A wave of codebook sums.
  static void codebook(const sikv_cache_view& view, const FitCall& wave, cudaStream_t stream);
};

extern template struct RotLmLaunches<64>;
extern template struct RotLmLaunches<96>;
extern template struct RotLmLaunches<128>;
extern template struct RotLmLaunches<256>;

}  // namespace sikv::cuda

#endif  // SIKV_CODECS_ROT_LM_ROT_LM_CUDA_H_
