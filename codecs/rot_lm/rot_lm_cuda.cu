// rot_lm on CUDA: the reference's bytes, its means and codebook to the bit.
#include "codecs/rot_lm/rot_lm_cuda.h"

#include "codecs/rot_lm/rot_lm.h"
#include "kernels/common/cuda_codec.h"

namespace sikv {
namespace {

template <bool kKeys>
class RotLmCuda final : public cuda::CudaCodec {
 public:
  explicit RotLmCuda(const CreateArgs& args)
      : CudaCodec(args, kKeys ? SIKV_KEY_CODEC : SIKV_VALUE_CODEC,
                  kKeys ? make_rot_lm_keys_ref(args) : make_rot_lm_values_ref(args)),
        params_(rlm4::read_params(layout_view())),
        line_(rlm4::read_line(layout_view())),
        fit_tokens_(static_cast<int>(args.options.integer("fit_tokens"))) {}

  uint64_t workspace_bytes() const override {
    return cuda::FitWorkspace(max_rows(), head_dim()).bytes();
  }

  void fit(const RowsView& rows, const CacheView& cache, Launch launch) override {
    if (rows.raw().max_count <= 0) return;
    const sikv_cache_view& view = cache.raw();
    const cudaStream_t stream = cuda::stream(launch);
    cuda::FitCall call =
        cuda::fit_call(rows.raw(), view, what(), fit_tokens_, max_rows(), launch.workspace);
    call.mean = planes(view).mean;
    cuda::launch_means(view, call, max_rows(), true, stream);
    if constexpr (kKeys) {
      call.codebook = cuda::table_of(view.key, SIKV_CODEBOOK);
      cuda::launch_codebook(view, call, max_rows(), stream, [&](const cuda::FitCall& wave) {
        cuda::with_head_dim(head_dim(), [&](auto dim) {
          cuda::RotLmLaunches<dim.value>::codebook(view, wave, stream);
        });
      });
    }
  }

  void encode(const RowsView& rows, const int32_t* first_slot, const CacheView& cache,
              Launch launch) override {
    cuda::with_head_dim(head_dim(), [&](auto dim) {
      cuda::RotLmLaunches<dim.value>::encode(kKeys, params_.bits, cache.raw(), rows.raw(),
                                             first_slot, planes(cache.raw()), cuda::stream(launch));
    });
  }

  void decode(const sikv_decode_args& args, const CacheView& cache, void* stream) const override {
    cuda::with_head_dim(head_dim(), [&](auto dim) {
      cuda::RotLmLaunches<dim.value>::decode(kKeys, params_.bits, args, planes(cache.raw()),
                                             static_cast<cudaStream_t>(stream));
    });
  }

 private:
  cuda::RotLmPlanes planes(const sikv_cache_view& view) const {
    const sikv_store_view& side = store(view);
    return {cuda::plane_of(side, SIKV_INDEX_CODE),
            cuda::plane_of(side, kKeys ? SIKV_MAGNITUDE : SIKV_VALUE_CODE),
            cuda::plane_of(side, kKeys ? SIKV_SCALE : SIKV_VALUE_SCALE),
            cuda::table_of(side, kKeys ? SIKV_KEY_MEAN : SIKV_VALUE_MEAN), line_};
  }

  rlm4::Params params_;
  int line_;
  int fit_tokens_;
};

template <bool kKeys>
std::unique_ptr<Codec> make_rot_lm_cuda(const CreateArgs& args) {
  return std::make_unique<RotLmCuda<kKeys>>(args);
}

}  // namespace
}  // namespace sikv

SIKV_PLUGIN(
    "rot_lm", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC),
    sikv::key_codec<sikv::make_rot_lm_cuda<true>, sikv::kRotLmKeyOptions, sikv::cuda::probe>(
        "cuda"),
    sikv::value_codec<sikv::make_rot_lm_cuda<false>, sikv::kRotLmValueOptions, sikv::cuda::probe>(
        "cuda"))
