#include <memory>
#include <string>

#include "kernels/common/block_tiles.cuh"
#include "plugins/sdk/plugin.h"

namespace sikv::sparse_flash {
namespace {

// Launches what reads these stores fastest. More than 8 query heads a KV head would need a second
// accumulator of each lane: they go the general way.
void launch(const cuda::FlashCall& call, cudaStream_t stream) {
  const cuda::RowStore &keys = call.keys, &values = call.values;
  const bool levels = values.kind == cuda::RowKind::kLevels && values.bits == 2;
  const bool min_max = values.kind == cuda::RowKind::kMinMax && values.bits == 2 &&
                       values.scale_group == 32 && values.dtype == SIKV_FP16;
  if (!cuda::tile_reads(keys) || !(levels || min_max) || call.group > 8) {
    return cuda::launch_attend_any(call, stream);
  }
  cuda::with_tile_keys(keys, [&](auto kind) {
    using Keys = cuda::CodeKeys<decltype(kind)::value>;
    if (levels) {
      cuda::launch_attend_tiles<Keys, cuda::LevelValues, 1>(call, stream);
    } else {
      cuda::launch_attend_tiles<Keys, cuda::MinMaxValues, 1>(call, stream);
    }
  });
}

class SparseFlash : public Kernel {
 public:
  explicit SparseFlash(const CreateArgs& args)
      : rows_(int64_t{args.shape.max_sequences} * args.shape.num_kv_heads),
        group_(args.group()),
        dim_(args.shape.head_dim),
        multiprocessors_(args.device.multiprocessors) {}

  void accepts(const LayoutView& key_layout, const LayoutView& value_layout) override {
    require(key_layout, "keys", &cuda::read_key_layout);
    require(value_layout, "values", &cuda::read_value_layout);
  }
  uint64_t plan(int32_t) override {
    tickets_.allocate(rows_);
    return cuda::flash_workspace_bytes(rows_, group_, dim_, multiprocessors_);
  }
  void run(const sikv_attend_args& args, const CacheView& view, Launch launch_on) override {
    // A capacity of 0 goes with selectors that select all. One that only now and then answers
    // SIKV_SELECT_ALL is served too, by fewer blocks than there could be.
    const int bound = args.selection.capacity > 0
                          ? std::min(args.selection.capacity, args.view->max_encoded_len)
                          : args.view->max_encoded_len;
    cuda::FlashCall call =
        cuda::flash_call(args, launch_on.workspace, tickets_,
                         cuda::flash_splits(bound, *args.view, multiprocessors_));
    call.keys = cuda::key_rows(args.view->key);
    call.values = cuda::value_rows(args.view->value);
    launch(call, cuda::stream(launch_on));
  }

 private:
  static void require(const LayoutView& layout, const char* what,
                      bool (*read)(const LayoutView&, cuda::RowStore&)) {
    cuda::RowStore rows;
    if (read(layout, rows)) return;
    throw Refused("sparse_flash cannot read " + std::string(what) + " stored as " +
                  std::string(layout.family()) + ".v" + std::to_string(layout.version()) +
                  ": use kernel gather_attention, which reads every layout");
  }

  int64_t rows_;
  int group_, dim_, multiprocessors_;
  cuda::Tickets tickets_;
};

std::unique_ptr<Kernel> make_cuda(const CreateArgs& args) {
  return std::make_unique<SparseFlash>(args);
}

}  // namespace
}  // namespace sikv::sparse_flash

SIKV_PLUGIN(
    "sparse_flash", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_KERNEL),
    sikv::kernel<sikv::sparse_flash::make_cuda, sikv::kNoOptions, sikv::cuda::probe>("cuda"))
