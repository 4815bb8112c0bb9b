#include <memory>

#include "kernels/common/overlapped_launch.cuh"
#include "plugins/sdk/scan_cost.h"
#include "selectors/full/full.h"

namespace sikv::full {
namespace {

constexpr int kThreads = 128;

__global__ __launch_bounds__(kThreads) void select_all(int32_t* counts, int rows) {
  const int row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  cuda::start_next_launch();
  if (row < rows) counts[row] = SIKV_SELECT_ALL;
}

class Full : public Selector {
 public:
  // No list is written, so none needs room.
  Plan plan() override { return {}; }

  void run(const sikv_select_args& args, const CacheView& view, Launch launch) override {
    const int rows = view.num_rows();
    const auto blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
    select_all<<<blocks, kThreads, 0, cuda::stream(launch)>>>(args.selection.counts, rows);
    cuda::check_launch("select_all", blocks, kThreads, cuda::stream(launch));
    cost_.add(0);
  }

  // Nothing is read, in whatever number of runs: those of a replayed graph are not counted.
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    cost_.push(push);
  }

 private:
  ScanCost cost_;
};

std::unique_ptr<Selector> make_cuda(const CreateArgs&) { return std::make_unique<Full>(); }

}  // namespace
}  // namespace sikv::full

SIKV_PLUGIN("full", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::full::make_cuda, sikv::kNoOptions, sikv::cuda::probe,
                           SIKV_SELECTOR_SELECTS_ALL>("cuda"))
