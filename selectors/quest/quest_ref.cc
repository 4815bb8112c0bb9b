#include <vector>

#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/select.h"
#include "plugins/sdk/state.h"
#include "selectors/quest/quest.h"

namespace sikv::quest {
namespace {

// Summaries of a row, [pages, 2, D] in the input type: channel minima, then maxima. An extreme of
// numbers of a type is a number of that type, so nothing is rounded.
using Summaries = std::vector<uint8_t>;

class Quest : public Selector {
 public:
  explicit Quest(const CreateArgs& args)
      : budget_(args.options.budget("budget")),
        page_tokens_(static_cast<int>(args.options.integer("page_tokens"))),
        shape_(args.shape),
        host_(args.host),
        summaries_(shape_) {}

  Plan plan() override { return {selection_capacity(budget_, shape_), 0}; }
  void begin_sequence(int sequence) override { summaries_.reset(sequence); }
  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    summarise(view.layer(), RowsView(args.keys), newly_encoded(args, view));
  }
  void observe_page(const sikv_observe_page_args& args, const CacheView& view, Launch) override {
    summarise(view.layer(), RowsView(args.keys), newly_encoded(args, view));
  }

  // Every token gets its page's score. The tie rule then takes whole pages, the lower one first
  // among equals, and of the last page the lower slots.
  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    const QueryView queries(args.q, view, args.num_query_heads);
    parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t) {
      const int row = static_cast<int>(i);
      const std::vector<float> page_scores =
          score_pages(summaries_.at(view.layer(), row), queries, row);
      std::vector<float> scores(static_cast<size_t>(view.encoded_len(row)));
      for (int slot = 0; slot < view.encoded_len(row); ++slot) {
        const auto page = static_cast<size_t>(view.position(row, slot) / page_tokens_);
        if (page >= page_scores.size()) {
          throw PluginBug("page " + std::to_string(page) + " was never observed");
        }
        scores[static_cast<size_t>(slot)] = page_scores[page];
      }
      SelectionRow out(args.selection, row);
      select_top(scores, view.pinned_slots(row), budget_.tokens(view.length(row)), out);
      cost_.add(std::ssize(summaries_.at(view.layer(), row)));
    });
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = 0;
    for (const Summaries& summaries : summaries_) bytes += summaries.size();
    return bytes;
  }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    cost_.push(push);
  }

 private:
  size_t page_bytes() const {
    return size_t{2} * static_cast<size_t>(shape_.head_dim * sikv_dtype_bytes(shape_.dtype));
  }

  void summarise(int layer, const RowsView& keys, const std::vector<NewTokens>& encoded) {
    parallel_for(host_, std::ssize(encoded), [&](int64_t i, int32_t) {
      const NewTokens& rows = encoded[static_cast<size_t>(i)];
      Summaries& summaries = summaries_.at(layer, rows.row);
      const int dim = shape_.head_dim;
      const size_t pages =
          static_cast<size_t>((rows.first_position + rows.count + page_tokens_ - 1) / page_tokens_);
      summaries.resize(pages * page_bytes());
      std::vector<float> key(static_cast<size_t>(dim));
      for (int t = 0; t < rows.count; ++t) {
        const int position = rows.first_position + t;
        const bool first = position % page_tokens_ == 0;
        const int64_t minima = int64_t{position / page_tokens_} * 2 * dim, maxima = minima + dim;
        keys.load(rows.sequence, t, rows.head, dim, key.data());
        for (int d = 0; d < dim; ++d) {
          const float k = key[static_cast<size_t>(d)];
          if (first || k < load(summaries, minima + d)) store(summaries, minima + d, k);
          if (first || k > load(summaries, maxima + d)) store(summaries, maxima + d, k);
        }
      }
    });
  }

  // The upper bound of q.k over a page, with the mean of the group's queries.
  std::vector<float> score_pages(const Summaries& summaries, const QueryView& queries,
                                 int row) const {
    const int dim = shape_.head_dim;
    std::vector<float> heads(static_cast<size_t>(queries.group() * dim));
    std::vector<float> q(static_cast<size_t>(dim));
    queries.load_group(row, heads.data());
    group_mean(heads.data(), queries.group(), dim, q.data());
    std::vector<float> scores(summaries.size() / page_bytes(), 0.0f);
    for (size_t page = 0; page < scores.size(); ++page) {
      const int64_t minima = static_cast<int64_t>(page) * 2 * dim, maxima = minima + dim;
      for (int d = 0; d < dim; ++d) {
        const float x = q[static_cast<size_t>(d)];
        scores[page] += std::max(x * load(summaries, minima + d), x * load(summaries, maxima + d));
      }
    }
    return scores;
  }

  float load(const Summaries& summaries, int64_t i) const {
    return sikv_load(summaries.data(), shape_.dtype, i);
  }
  void store(Summaries& summaries, int64_t i, float x) const {
    sikv_store(summaries.data(), shape_.dtype, i, x);
  }

  Budget budget_;
  int page_tokens_;
  sikv_shape shape_;
  const sikv_host& host_;
  RowState<Summaries> summaries_;
  ScanCost cost_;
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs& args) { return std::make_unique<Quest>(args); }

}  // namespace sikv::quest
