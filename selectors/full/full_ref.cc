#include "plugins/sdk/scan_cost.h"
#include "selectors/full/full.h"

namespace sikv::full {
namespace {

class Full : public Selector {
 public:
  // No list is written, so none needs room.
  Plan plan() override { return {}; }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      SelectionRow(args.selection, row).select_all();
      cost_.add(0);
    }
  }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    cost_.push(push);
  }

 private:
  ScanCost cost_;
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs&) { return std::make_unique<Full>(); }

}  // namespace sikv::full
