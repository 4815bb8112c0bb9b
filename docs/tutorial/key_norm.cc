// key_norm: keeps the tokens whose keys have the smallest L2 norm ("A Simple and Effective L2
// Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430). The query is never asked.
#include "plugins/sdk/plugin.h"
#include "plugins/sdk/select.h"
#include "plugins/sdk/state.h"

namespace {
constexpr sikv_option_spec kOptions[] = {
    sikv::budget_option("budget", "256", "tokens to select: a count or a fraction of the sequence"),
};

class KeyNorm final : public sikv::Selector {
 public:
  explicit KeyNorm(const sikv::CreateArgs& args)
      : shape_(args.shape), budget_(args.options.budget("budget")), scores_(args.shape) {}

  Plan plan() override { return {sikv::selection_capacity(budget_, shape_), 0}; }
  void begin_sequence(int sequence) override { scores_.reset(sequence); }
  // Exact keys pass by twice: with the prompt, and whenever a page is encoded in decode.
  void observe(const sikv_observe_args& args, const sikv::CacheView& view, sikv::Launch) override {
    score(sikv::RowsView(args.keys), sikv::newly_encoded(args, view), view);
  }
  void observe_page(const sikv_observe_page_args& args, const sikv::CacheView& view,
                    sikv::Launch) override {
    score(sikv::RowsView(args.keys), sikv::newly_encoded(args, view), view);
  }
  void run(const sikv_select_args& args, const sikv::CacheView& view, sikv::Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      sikv::SelectionRow selection(args.selection, row);
      sikv::select_top(scores_.at(view.layer(), row), view.pinned_slots(row),
                       budget_.tokens(view.length(row)), selection);
    }
  }

 private:
  void score(const sikv::RowsView& keys, const std::vector<sikv::NewTokens>& encoded,
             const sikv::CacheView& view) {
    std::vector<float> key(view.head_dim());
    for (const sikv::NewTokens& tokens : encoded) {
      for (int t = 0; t < tokens.count; ++t) {
        keys.load(tokens.sequence, t, tokens.head, view.head_dim(), key.data());
        float square = 0.0f;
        for (float x : key) square += x * x;
        scores_.at(view.layer(), tokens.row).push_back(-square);
      }
    }
  }
  sikv_shape shape_;
  sikv::Budget budget_;
  sikv::RowState<std::vector<float>> scores_;  // minus the squared norm, by slot
};
std::unique_ptr<sikv::Selector> make(const sikv::CreateArgs& args) {
  return std::make_unique<KeyNorm>(args);
}

}  // namespace

SIKV_PLUGIN("key_norm", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<make, kOptions>("ref"))
