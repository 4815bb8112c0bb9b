#include <memory>
#include <string>

#include "kernels/common/block_tiles.cuh"
#include "plugins/sdk/plugin.h"

namespace sikv::sparse_flash {
namespace {

bool has_levels(const cuda::RowStore& values) {
  return values.kind == cuda::RowKind::kLevels && values.bits == 2;
}

// Whether tensor cores read these stores. More than 8 query heads a KV head would need a second
// accumulator of each lane: they go the general way.
bool by_tiles(const cuda::RowStore& keys, const cuda::RowStore& values, int group) {
  const bool min_max = values.kind == cuda::RowKind::kMinMax && values.bits == 2 &&
                       values.scale_group == 32 && values.dtype == SIKV_FP16;
  return cuda::tile_reads(keys) && (has_levels(values) || min_max) && group <= 8;
}

void launch_tiles(const cuda::FlashCall& call, cudaStream_t stream) {
  const auto launch = [&](auto kind, auto four) {
    using Keys = cuda::CodeKeys<decltype(kind)::value, decltype(four)::value>;
    if (has_levels(call.values)) {
      cuda::launch_attend_tiles<Keys, cuda::LevelValues, 1>(call, stream);
    } else {
      cuda::launch_attend_tiles<Keys, cuda::MinMaxValues, 1>(call, stream);
    }
  };
  cuda::with_tile_keys(call.keys, [&](auto kind) {
    call.group <= 4 ? launch(kind, std::true_type{}) : launch(kind, std::false_type{});
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
    const cuda::RowStore keys = cuda::key_rows(args.view->key);
    const cuda::RowStore values = cuda::value_rows(args.view->value);
    const bool tiles = by_tiles(keys, values, group_);
    const bool can_join = tiles && args.view->dtype != SIKV_FP32;
    cuda::FlashCall call =
        cuda::flash_call(args, launch_on.workspace, tickets_,
                         cuda::flash_splits(bound, *args.view, multiprocessors_, can_join));
    call.keys = keys;
    call.values = values;
    const cudaStream_t stream = cuda::stream(launch_on);
    tiles ? launch_tiles(call, stream) : cuda::launch_attend_any(call, stream);
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
