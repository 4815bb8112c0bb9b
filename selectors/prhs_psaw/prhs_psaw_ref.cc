#include "selectors/prhs_psaw/prhs_psaw.h"

namespace sikv::prhs_psaw {
namespace {

class Psaw : public Selector {
 public:
  explicit Psaw(const CreateArgs& args)
      : cut_(DepthPrefix::psaw(args.options, args.shape.num_layers)), shape_(args.shape) {}

  Plan plan() override { return {shape_.max_tokens, 0}; }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      const int64_t start = cut_.tokens(view.layer(), sequence_length(view, row));
      const int32_t first = first_slot_from(view, row, start);
      SelectionRow out(args.selection, row);
      ++runs_;
      if (first == 0) {
        out.select_all();
        continue;
      }
      out.clear();
      for_each_unpinned(view.encoded_len(row), view.pinned_slots(row), [&](int32_t slot) {
        if (slot >= first) out.push(slot);
      });
    }
  }

  // Positions decide; nothing of the cache is read.
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    push("runs", runs_);
    push("scan_bytes", 0);
  }

 private:
  DepthPrefix cut_;
  sikv_shape shape_;
  double runs_ = 0;
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs& args) { return std::make_unique<Psaw>(args); }

}  // namespace sikv::prhs_psaw
