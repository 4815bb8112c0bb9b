#include <random>

#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/select.h"
#include "selectors/random/random.h"

namespace sikv::random {
namespace {

class Random : public Selector {
 public:
  explicit Random(const CreateArgs& args)
      : budget_(args.options.budget("budget")),
        seed_(args.options.integer("seed")),
        shape_(args.shape),
        host_(args.host) {}

  Plan plan() override { return {selection_capacity(budget_, shape_), 0}; }
  void begin_step(int64_t step) override { step_ = step; }

  // Selection sampling (Knuth's algorithm S): one pass, exactly uniform, ascending as it goes.
  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t) {
      const int row = static_cast<int>(i);
      const auto pinned = view.pinned_slots(row);
      int64_t left = view.encoded_len(row) - std::ssize(pinned);
      int64_t wanted = std::min(left, budget_.tokens(view.length(row)));
      std::seed_seq seed{seed_, int64_t{view.layer()}, i, step_};
      std::mt19937_64 generator(seed);
      SelectionRow out(args.selection, row);
      out.clear();
      for_each_unpinned(view.encoded_len(row), pinned, [&](int32_t slot) {
        const double uniform = static_cast<double>(generator() >> 11) * 0x1p-53;
        if (uniform * static_cast<double>(left--) < static_cast<double>(wanted)) {
          out.push(slot);
          --wanted;
        }
      });
      cost_.add(0);
    });
  }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    cost_.push(push);
  }

 private:
  Budget budget_;
  int64_t seed_;
  sikv_shape shape_;
  const sikv_host& host_;
  int64_t step_ = 0;
  ScanCost cost_;
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return std::make_unique<Random>(args);
}

}  // namespace sikv::random
