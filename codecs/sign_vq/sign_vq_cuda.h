// Between sign_vq_cuda.cu and the files that hold its kernels for one head_dim each.
#ifndef SIKV_CODECS_SIGN_VQ_SIGN_VQ_CUDA_H_
#define SIKV_CODECS_SIGN_VQ_SIGN_VQ_CUDA_H_

#include "kernels/common/fit.cuh"
#include "kernels/common/thread_cache.cuh"
#include "plugins/abi/sikv_codec.h"
#include "plugins/layouts/sign4_v1.h"

namespace sikv::cuda {

// Planes (null where the layout has none) and side tables.
struct SignVqPlanes {
  Plane index, magnitude, scale;
  const float *codebook, *mean, *alpha;
};

// Launches for head_dim D; the definitions are in sign_vq_launch.cuh.
template <int D>
struct SignVqLaunches {
  static void encode(const sign4::Params& params, const sikv_cache_view& view,
                     const sikv_rows& rows, const int32_t* first_slot, const SignVqPlanes& planes,
                     cudaStream_t stream);
  static void decode(const sign4::Params& params, const sikv_decode_args& args,
                     const SignVqPlanes& planes, cudaStream_t stream);
  // A wave of codebook sums.
  static void codebook(const sikv_cache_view& view, const FitCall& wave, cudaStream_t stream);
};

extern template struct SignVqLaunches<64>;
extern template struct SignVqLaunches<96>;
extern template struct SignVqLaunches<128>;
extern template struct SignVqLaunches<256>;

}  // namespace sikv::cuda

#endif  // SIKV_CODECS_SIGN_VQ_SIGN_VQ_CUDA_H_
