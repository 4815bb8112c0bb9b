// fp16 on CUDA: rows as they came, to their pages.
#include "codecs/fp16/fp16.h"
#include "kernels/common/cuda_codec.h"
#include "kernels/common/thread_minmax.cuh"
#include "plugins/layouts/raw_v1.h"

namespace sikv {
namespace {

template <bool kKeys>
class Fp16Cuda final : public cuda::CudaCodec {
 public:
  explicit Fp16Cuda(const CreateArgs& args)
      : CudaCodec(args, kKeys ? SIKV_KEY_CODEC : SIKV_VALUE_CODEC,
                  kKeys ? make_fp16_keys_ref(args) : make_fp16_values_ref(args)),
        params_(raw::read_params(layout_view())) {}

  void fit(const RowsView& rows, const CacheView& cache, Launch launch) override {
    check_newest(rows.raw(), cache.raw(), launch);
  }
  void encode(const RowsView& rows, const int32_t* first_slot, const CacheView& cache,
              Launch launch) override {
    with_format(cache.raw(), [&](const auto& format) {
      cuda::launch_encode(cache.raw(), rows.raw(), first_slot, what(), format,
                          cuda::stream(launch));
    });
  }
  void decode(const sikv_decode_args& args, const CacheView& cache, void* stream) const override {
    with_format(cache.raw(), [&](const auto& format) {
      cuda::launch_decode(args, format, static_cast<cudaStream_t>(stream));
    });
  }

 private:
  template <typename Body>
  void with_format(const sikv_cache_view& view, const Body& body) const {
    const cuda::Plane rows = cuda::plane_of(store(view), kKeys ? SIKV_MAGNITUDE : SIKV_VALUE_CODE);
    cuda::with_head_dim(head_dim(), [&](auto dim) {
      body(cuda::RawFormat<dim.value>{rows, params_.dtype});
    });
  }

  raw::Params params_;
};

template <bool kKeys>
std::unique_ptr<Codec> make_fp16_cuda(const CreateArgs& args) {
  return std::make_unique<Fp16Cuda<kKeys>>(args);
}

}  // namespace
}  // namespace sikv

SIKV_PLUGIN(
    "fp16", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC),
    sikv::key_codec<sikv::make_fp16_cuda<true>, sikv::kNoOptions, sikv::cuda::probe>("cuda"),
    sikv::value_codec<sikv::make_fp16_cuda<false>, sikv::kNoOptions, sikv::cuda::probe>("cuda"))
