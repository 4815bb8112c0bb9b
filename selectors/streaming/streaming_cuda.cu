#include <algorithm>
#include <cub/block/block_scan.cuh>
#include <memory>

#include "kernels/common/cuda_launch.h"
#include "kernels/common/thread_select.cuh"
#include "plugins/sdk/select.h"
#include "selectors/streaming/streaming.h"

namespace sikv::streaming {
namespace {

constexpr int kThreads = 256;

// What stays of a row, by rank among its unpinned slots: the first `sinks` and the last `window`.
struct Kept {
  int unpinned, sinks, window;

  __device__ Kept(const sikv_cache_view& view, const cuda::Unpinned& slots, int row,
                  const cuda::DeviceBudget& budget, int num_sinks) {
    const int encoded = view.encoded_len[row];
    unpinned = slots.rank(encoded);
    const auto most = static_cast<int>(
        min(budget.tokens(cuda::row_length(view, row)), static_cast<int64_t>(unpinned)));
    sinks = min(slots.rank(min(num_sinks, encoded)), most);
    window = most - sinks;
  }
};

// Grid (capacity / kThreads, rows).
__global__ __launch_bounds__(kThreads) void select_sinks_and_window(
    const __grid_constant__ sikv_cache_view view, sikv_selection selection,
    cuda::DeviceBudget budget, int sinks) {
  const int row = static_cast<int>(blockIdx.y);
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const cuda::Unpinned slots(view, row);
  const Kept kept(view, slots, row, budget, sinks);
  if (i == 0) selection.counts[row] = kept.sinks + kept.window;
  if (i >= kept.sinks + kept.window) return;
  const int rank = i < kept.sinks ? i : kept.unpinned - kept.window + i - kept.sinks;
  selection.slots[int64_t{row} * selection.capacity + i] = slots.slot(rank);
}

// One block a row. With `whole_pages` a slot stays with any other of its page.
__global__ __launch_bounds__(kThreads) void list_kept(const __grid_constant__ sikv_cache_view view,
                                                      int32_t* keep_slots, int32_t* keep_counts,
                                                      cuda::DeviceBudget budget, int sinks,
                                                      bool whole_pages) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  const int row = static_cast<int>(blockIdx.x), encoded = view.encoded_len[row];
  const cuda::Unpinned slots(view, row);
  const Kept kept(view, slots, row, budget, sinks);
  int32_t* const out = keep_slots + int64_t{row} * view.max_encoded_len;
  int listed = 0;
  for (int base = 0; base < encoded; base += kThreads) {
    const int slot = base + static_cast<int>(threadIdx.x);
    bool keep = slot < encoded;
    if (keep) {
      const int page = slot / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
      const int first = whole_pages ? page : slot;
      const int end = whole_pages ? min(page + SIKV_PAGE_TOKENS, encoded) : slot + 1;
      const int low = slots.rank(first), high = slots.rank(end);
      const bool any_pinned = high - low < end - first;
      keep = any_pinned || low < kept.sinks || high > kept.unpinned - kept.window;
    }
    int before, total;
    Scan(storage).ExclusiveSum(keep ? 1 : 0, before, total);
    if (keep) out[listed + before] = slot;
    listed += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) keep_counts[row] = listed == encoded ? SIKV_SELECT_ALL : listed;
}

__global__ __launch_bounds__(kThreads) void keep_all(int32_t* keep_counts, int rows) {
  const int row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (row < rows) keep_counts[row] = SIKV_SELECT_ALL;
}

bool shares_bytes(const sikv_layout& layout) {
  return std::any_of(layout.planes, layout.planes + layout.num_planes,
                     [](const sikv_plane& plane) { return plane.organisation == SIKV_SHARED; });
}

class Streaming : public EvictingSelector {
 public:
  explicit Streaming(const CreateArgs& args)
      : budget_(args.options.budget("budget")),
        sinks_(static_cast<int>(args.options.integer("sinks"))),
        evict_(args.options.flag("evict")),
        shape_(args.shape) {
    if (evict_ && budget_.count < 0) {
      throw Refused(
          "streaming(evict=true) takes its budget in tokens: a fraction of what is left would "
          "shrink with every eviction");
    }
  }

  Plan plan() override { return {selection_capacity(budget_, shape_), 0}; }

  void run(const sikv_select_args& args, const CacheView& view, Launch launch) override {
    const int blocks = std::max((args.selection.capacity + kThreads - 1) / kThreads, 1);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(view.num_rows()));
    select_sinks_and_window<<<grid, kThreads, 0, cuda::stream(launch)>>>(
        *args.view, args.selection, cuda::DeviceBudget(budget_), sinks_);
    cuda::check_launch("select_sinks_and_window", grid, kThreads, cuda::stream(launch));
  }

  // Keeps what run would select, and the pinned tokens. Where tokens share bytes whole pages stay:
  // groups then hold together and the next page starts at a multiple of 256.
  void evict(const sikv_evict_args& args, const CacheView& view, Launch launch) override {
    const cudaStream_t stream = cuda::stream(launch);
    const auto rows = static_cast<unsigned>(view.num_rows());
    if (!evict_) {
      const unsigned blocks = (rows + kThreads - 1) / kThreads;
      keep_all<<<blocks, kThreads, 0, stream>>>(args.keep_counts, view.num_rows());
      return cuda::check_launch("keep_all", blocks, kThreads, stream);
    }
    const bool shared =
        shares_bytes(*args.view->key.layout) || shares_bytes(*args.view->value.layout);
    list_kept<<<rows, kThreads, 0, stream>>>(*args.view, args.keep_slots, args.keep_counts,
                                             cuda::DeviceBudget(budget_), sinks_, shared);
    cuda::check_launch("list_kept", rows, kThreads, stream);
  }

 private:
  Budget budget_;
  int sinks_;
  bool evict_;
  sikv_shape shape_;
};

std::unique_ptr<EvictingSelector> make_cuda(const CreateArgs& args) {
  return std::make_unique<Streaming>(args);
}

}  // namespace
}  // namespace sikv::streaming

SIKV_PLUGIN("streaming", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::evicting_selector<sikv::streaming::make_cuda, sikv::streaming::kOptions,
                                    sikv::cuda::probe>("cuda"))
