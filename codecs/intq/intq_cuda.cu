// intq on CUDA, with the reference's bytes.
#include "codecs/intq/intq.h"
#include "kernels/common/cuda_codec.h"
#include "kernels/common/thread_minmax.cuh"

namespace sikv {
namespace {

class IntqCuda final : public cuda::CudaCodec {
 public:
  explicit IntqCuda(const CreateArgs& args)
      : CudaCodec(args, SIKV_VALUE_CODEC, make_intq_ref(args)),
        params_(intq::read_params(layout_view())) {}

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
    const cuda::Plane code = cuda::plane_of(view.value, SIKV_VALUE_CODE);
    cuda::with_head_dim(head_dim(), [&](auto dim) {
      if (!intq::has_scale(params_)) {
        return body(cuda::RawFormat<dim.value>{code, params_.value_dtype});
      }
      cuda::with_minmax_format<dim.value, 2, 4, 8>(
          params_.bits, code, cuda::plane_of(view.value, SIKV_VALUE_SCALE),
          {params_.scale_group, params_.scale_dtype}, intq::scale_bytes(params_), body);
    });
  }

  intq::Params params_;
};

std::unique_ptr<Codec> make_intq_cuda(const CreateArgs& args) {
  return std::make_unique<IntqCuda>(args);
}

}  // namespace
}  // namespace sikv

SIKV_PLUGIN("intq", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_VALUE_CODEC),
            sikv::value_codec<sikv::make_intq_cuda, sikv::kIntqOptions, sikv::cuda::probe>("cuda"))
