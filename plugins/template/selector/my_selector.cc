// my_selector: the tokens whose stored keys match the query best.
//
// Scores every encoded token with the mean of its KV head's queries and keeps the `budget` best. It
// reads keys through their codec's own decode, so it works with every codec.
#include "plugins/sdk/plugin.h"
#include "plugins/sdk/select.h"

namespace {

constexpr sikv_option_spec kOptions[] = {
    sikv::budget_option("budget", "256", "tokens to select: a count or a fraction of the sequence"),
};

class MySelector final : public sikv::Selector {
 public:
  explicit MySelector(const sikv::CreateArgs& args)
      : host_(args.host), shape_(args.shape), budget_(args.options.budget("budget")) {}

  Plan plan() override { return {sikv::selection_capacity(budget_, shape_), 0}; }

  // One decode step of one layer. A row is one KV head of one sequence; rows run in parallel.
  void run(const sikv_select_args& args, const sikv::CacheView& view, sikv::Launch) override {
    const sikv::QueryView queries(args.q, view, args.num_query_heads);
    sikv::parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t) {
      const int row = static_cast<int>(i);
      std::vector<float> heads(queries.group() * view.head_dim()), query(view.head_dim());
      queries.load_group(row, heads.data());
      sikv::group_mean(heads.data(), queries.group(), view.head_dim(), query.data());

      std::vector<float> scores, key(view.head_dim());
      for (int32_t slot = 0; slot < view.encoded_len(row); ++slot) {
        view.key().decode(row, {&slot, 1}, key.data());
        float score = 0.0f;
        for (int d = 0; d < view.head_dim(); ++d) score += query[d] * key[d];
        scores.push_back(score);
      }

      // Leaves pinned tokens out, breaks ties, writes slots in ascending order.
      sikv::SelectionRow selection(args.selection, row);
      const int64_t budget = budget_.tokens(view.length(row));
      sikv::select_top(scores, view.pinned_slots(row), budget, selection);
    });
  }

 private:
  const sikv_host& host_;
  sikv_shape shape_;
  sikv::Budget budget_;
};

std::unique_ptr<sikv::Selector> make(const sikv::CreateArgs& args) {
  return std::make_unique<MySelector>(args);
}

}  // namespace

SIKV_PLUGIN("my_selector", "0.1.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<make, kOptions>("ref"))
