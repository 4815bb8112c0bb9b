// Host side of CUDA codecs: the layout comes from the scalar reference, which is never run.
#ifndef SIKV_KERNELS_COMMON_CUDA_CODEC_H_
#define SIKV_KERNELS_COMMON_CUDA_CODEC_H_

#include <memory>
#include <utility>

#include "kernels/common/cuda_launch.h"
#include "kernels/common/fit.cuh"

namespace sikv::cuda {

class CudaCodec : public Codec {
 public:
  const sikv_layout& layout() const final { return ref_->layout(); }

 protected:
  CudaCodec(const CreateArgs& args, sikv_kind kind, std::unique_ptr<Codec> ref)
      : ref_(std::move(ref)),
        kind_(kind),
        max_rows_(args.shape.max_sequences * args.shape.num_kv_heads) {}

  int head_dim() const { return static_cast<int>(layout().head_dim); }
  LayoutView layout_view() const { return LayoutView(layout()); }
  int max_rows() const { return max_rows_; }
  sikv_fault_what what() const { return kind_ == SIKV_KEY_CODEC ? SIKV_FAULT_K : SIKV_FAULT_V; }
  const sikv_store_view& store(const sikv_cache_view& view) const {
    return kind_ == SIKV_KEY_CODEC ? view.key : view.value;
  }

  // Fit of a codec without tables: checks what no encode may see.
  void check_newest(const sikv_rows& rows, const sikv_cache_view& view, Launch launch) const {
    if (rows.max_count <= 0) return;
    FitCall call{};
    call.rows = rows;
    call.what = what();
    launch_check_newest(view, call, cuda::stream(launch));
  }

 private:
  std::unique_ptr<Codec> ref_;
  sikv_kind kind_;
  int max_rows_;
};

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_CUDA_CODEC_H_
