// The launches of rot_lm; included by rot_lm_d<D>.cu, which instantiate them for one head_dim, so
// that the 6 encode kernels of each are compiled side by side.
#ifndef SIKV_CODECS_ROT_LM_ROT_LM_LAUNCH_CUH_
#define SIKV_CODECS_ROT_LM_ROT_LM_LAUNCH_CUH_

#include <type_traits>

#include "codecs/rot_lm/rot_lm_cuda.h"
#include "codecs/rot_lm/rot_lm_decode.cuh"
#include "codecs/rot_lm/rot_lm_encode.cuh"
#include "codecs/rot_lm/rot_lm_fit.cuh"

namespace sikv::cuda {

// body(bits, keys) as constants.
template <typename Body>
void with_rot_lm(bool keys, int bits, const Body& body) {
  const auto with_keys = [&](auto constant) {
    keys ? body(constant, std::true_type{}) : body(constant, std::false_type{});
  };
  switch (bits) {
    case 2:
      return with_keys(std::integral_constant<int, 2>{});
    case 3:
      return with_keys(std::integral_constant<int, 3>{});
    default:
      return with_keys(std::integral_constant<int, 4>{});
  }
}

template <int D>
void RotLmLaunches<D>::encode(bool keys, int bits, const sikv_cache_view& view,
                              const sikv_rows& rows, const int32_t* first_slot,
                              const RotLmPlanes& planes, cudaStream_t stream) {
  with_rot_lm(keys, bits, [&](auto b, auto k) {
    launch_encode(view, rows, first_slot, keys ? SIKV_FAULT_K : SIKV_FAULT_V,
                  RotLmFormat<D, b.value, k.value>{planes}, stream);
  });
}

template <int D>
void RotLmLaunches<D>::decode(bool keys, int bits, const sikv_decode_args& args,
                              const RotLmPlanes& planes, cudaStream_t stream) {
  with_rot_lm(keys, bits, [&](auto b, auto k) {
    launch_decode(args, RotLmDecode<D, b.value, k.value>{planes}, stream);
  });
}

template <int D>
void RotLmLaunches<D>::codebook(const sikv_cache_view& view, const FitCall& wave,
                                cudaStream_t stream) {
  launch_rotated_codebook<D>(view, wave, stream);
}

}  // namespace sikv::cuda

#endif  // SIKV_CODECS_ROT_LM_ROT_LM_LAUNCH_CUH_
