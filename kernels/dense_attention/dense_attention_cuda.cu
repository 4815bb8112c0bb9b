#include <memory>
#include <string>

#include "kernels/common/block_tiles.cuh"
#include "plugins/sdk/plugin.h"

namespace sikv::dense_attention {
namespace {

// Launches what reads these rows fastest: the tensor cores take 16-bit types and 8 query heads a KV
// head, the rest goes through fp32 units.
void launch(const cuda::FlashCall& call, cudaStream_t stream) {
  const int32_t dtype = call.view.dtype;
  if (dtype == SIKV_FP32 || call.keys.dtype != dtype || call.values.dtype != dtype ||
      call.group > 8) {
    return cuda::launch_attend_any(call, stream);
  }
  cuda::with_head_dim(call.view.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const auto with_type = [&](auto element) {
      using T = decltype(element);
      cuda::launch_attend_tiles<cuda::RawKeys<T, kDim, 1>, cuda::RawValues<T, kDim>, 1>(call,
                                                                                        stream);
    };
    if (dtype == SIKV_FP16) {
      with_type(__half{});
    } else {
      with_type(__nv_bfloat16{});
    }
  });
}

class DenseAttention : public Kernel {
 public:
  explicit DenseAttention(const CreateArgs& args)
      : rows_(int64_t{args.shape.max_sequences} * args.shape.num_kv_heads),
        group_(args.group()),
        dim_(args.shape.head_dim),
        multiprocessors_(args.device.multiprocessors) {}

  void accepts(const LayoutView& key_layout, const LayoutView& value_layout) override {
    require_raw(key_layout, "keys");
    require_raw(value_layout, "values");
  }
  uint64_t plan(int32_t) override {
    tickets_.allocate(rows_);
    return cuda::flash_workspace_bytes(rows_, group_, dim_, multiprocessors_);
  }
  // Pinned tokens are attended where they are stored: their copies hold the same bytes.
  void run(const sikv_attend_args& args, const CacheView& view, Launch launch_on) override {
    cuda::FlashCall call = cuda::flash_call(
        args, launch_on.workspace, tickets_,
        cuda::flash_splits(args.view->max_encoded_len, *args.view, multiprocessors_));
    call.keys = cuda::key_rows(args.view->key);
    call.values = cuda::value_rows(args.view->value);
    call.listed = cuda::Listed::kPages;
    launch(call, cuda::stream(launch_on));
  }

 private:
  static void require_raw(const LayoutView& layout, const char* what) {
    if (layout.is(raw::kFamily, raw::kVersion)) return;
    throw Refused("dense_attention reads layout raw.v1 alone and the " + std::string(what) +
                  " are stored as " + std::string(layout.family()) + ".v" +
                  std::to_string(layout.version()) +
                  ": use kernel gather_attention with selector full");
  }

  int64_t rows_;
  int group_, dim_, multiprocessors_;
  cuda::Tickets tickets_;
};

std::unique_ptr<Kernel> make_cuda(const CreateArgs& args) {
  return std::make_unique<DenseAttention>(args);
}

}  // namespace
}  // namespace sikv::dense_attention

SIKV_PLUGIN("dense_attention", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_KERNEL),
            sikv::kernel<sikv::dense_attention::make_cuda, sikv::kNoOptions, sikv::cuda::probe,
                         SIKV_KERNEL_ATTENDS_ALL>("cuda"))
