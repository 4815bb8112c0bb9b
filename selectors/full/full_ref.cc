#include "selectors/full/full.h"

namespace sikv::full {
namespace {

class Full : public Selector {
 public:
  // No list is written, so none needs room.
  Plan plan() override { return {}; }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) SelectionRow(args.selection, row).select_all();
  }
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs&) { return std::make_unique<Full>(); }

}  // namespace sikv::full
