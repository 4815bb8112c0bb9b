#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "kernels/common/head_mean.h"
#include "kernels/common/prompt_eviction.h"
#include "selectors/laprox/laprox.h"

namespace sikv::laprox {
namespace {

class LaProx final : public PromptEviction {
 public:
  LaProx(const CreateArgs& args, const Math& math)
      : PromptEviction(args, static_cast<int>(args.options.integer("window"))),
        ranking_(args.options, math.window),
        norms_(math.norms),
        budget_(args.options.budget("budget")),
        of_attention_(args.options.choice("group") == "attention"),
        share_heads_(args.options.flag("share_heads")),
        candidates_(args.shape),
        kept_(args.shape) {}

  void begin_sequence(int sequence) override {
    PromptEviction::begin_sequence(sequence);
    candidates_.reset(sequence);
    kept_.reset(sequence);
  }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch launch) override {
    PromptEviction::observe(args, view, launch);
    const int heads = view.num_kv_heads();
    for (int first = 0; share_heads_ && first < view.num_rows(); first += heads) {
      average_heads(
          first, heads, [&](int row) -> auto& { return prompt_scores(view.layer(), row); });
    }
    normalise(view);
    note_candidates(args, view, launch);
    if (view.layer() == shape().num_layers - 1) {
      for (int b = 0; b < view.num_sequences(); ++b) split(b);
    }
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = PromptEviction::state_bytes();
    for (const Candidates& row : candidates_) bytes += row.scores.capacity() * sizeof(float);
    return bytes;
  }

 private:
  struct Candidates {
    std::vector<float> scores;  // of the tokens that compete
    int64_t share = 0;          // of the budget, what is left for them
  };

  std::vector<float> score_row(const sikv_observe_args& args, const CacheView& view,
                               int row) const override {
    const int heads = view.num_kv_heads(), dim = view.head_dim();
    const auto prompt = static_cast<size_t>(args.prompt_len[row / heads]);
    const int queries = window_queries(args, view, row, window());
    // Per pool of query heads: squares of what a token got from each query, summed.
    const int pooled = of_attention_ ? group() : 1, pools = group() / pooled;
    std::vector<std::vector<float>> squares(static_cast<size_t>(pools),
                                            std::vector<float>(prompt, 0.0f));
    int next = 0;
    for_each_window_softmax(args, view, row, group(), queries, pooled, ranking_.math(),
                            [&](std::span<const float> probability) {
                              auto& sum = squares[static_cast<size_t>(next++ % pools)];
                              for (size_t t = 0; t < probability.size(); ++t) {
                                sum[t] += probability[t] * probability[t];
                              }
                            });
    std::vector<float> scores(prompt, 0.0f);
    for (int g = 0; g < group(); ++g) {
      const int64_t head = int64_t{row % heads} * group() + g;
      const auto norms = norms_(args, view, row, args.w_o + head * dim * args.hidden);
      const auto& of_head = squares[static_cast<size_t>(g % pools)];
      for (size_t t = 0; t < prompt; ++t) {
        scores[t] += std::sqrt(of_head[t]) * norms[t] / static_cast<float>(group());
      }
    }
    return ranking_.pool(std::move(scores), window());
  }

  int64_t kept(int layer, int row, int64_t, int64_t, int64_t in_window) const override {
    return in_window + kept_.at(layer, row);
  }

  // Scores of a layer, all heads together, sum to 1: so layers compare.
  void normalise(const CacheView& view) {
    const int heads = view.num_kv_heads();
    for (int first = 0; first < view.num_rows(); first += heads) {
      double sum = 1e-30;
      for (int h = 0; h < heads; ++h) {
        for (const float score : prompt_scores(view.layer(), first + h)) {
          if (score < kAlwaysKept) sum += score;
        }
      }
      for (int h = 0; h < heads; ++h) {
        for (float& score : prompt_scores(view.layer(), first + h)) {
          score = static_cast<float>(score / sum);
        }
      }
    }
  }

  void note_candidates(const sikv_observe_args& args, const CacheView& view, Launch launch) {
    std::vector<float> scores(static_cast<size_t>(view.num_rows()) *
                              static_cast<size_t>(view.raw().max_encoded_len));
    score({sizeof(sikv_score_args), 0, &view.raw(), scores.data()}, view, launch);
    for (int row = 0; row < view.num_rows(); ++row) {
      const RankedRow ranked = ranked_row(view, row, scores);
      const int64_t in_window = std::ssize(ranked.fixed) - std::ssize(view.pinned_slots(row));
      const int64_t budget = budget_.tokens(args.prompt_len[row / view.num_kv_heads()]);
      Candidates& to = candidates_.at(view.layer(), row);
      to.share = std::max<int64_t>(budget - in_window, 0);
      to.scores.clear();
      for (const int32_t slot : ranked.competing) {
        to.scores.push_back(ranked.scores[static_cast<size_t>(slot)]);
      }
    }
  }

  // The best candidates of all layers and heads of a sequence share what is left of its budgets.
  void split(int sequence) {
    struct Entry {
      float score;
      int32_t layer, row;
    };
    const int heads = shape().num_kv_heads;
    std::vector<Entry> entries;
    int64_t total = 0;
    for (int l = 0; l < shape().num_layers; ++l) {
      for (int row = sequence * heads; row < (sequence + 1) * heads; ++row) {
        Candidates& from = candidates_.at(l, row);
        for (const float score : from.scores) entries.push_back({score, l, row});
        total += from.share;
        std::vector<float>().swap(from.scores);
        kept_.at(l, row) = 0;
      }
    }
    total = std::min(total, std::ssize(entries));
    // Equal scores: the lower layer first, then the lower head.
    std::nth_element(entries.begin(), entries.begin() + total, entries.end(),
                     [](const Entry& a, const Entry& b) {
                       return std::tuple(-a.score, a.layer, a.row) <
                              std::tuple(-b.score, b.layer, b.row);
                     });
    for (int64_t i = 0; i < total; ++i) {
      const Entry& entry = entries[static_cast<size_t>(i)];
      ++kept_.at(entry.layer, entry.row);
    }
  }

  WindowRanking ranking_;
  ProjectedNorms norms_;
  Budget budget_;
  bool of_attention_, share_heads_;
  RowState<Candidates> candidates_;  // until the last layer's prompt
  RowState<int64_t> kept_;           // of the candidates
};

}  // namespace

std::vector<float> explicit_norms(const sikv_observe_args& args, const CacheView& view, int row,
                                  const float* w) {
  const int heads = view.num_kv_heads(), dim = view.head_dim();
  const int b = row / heads, h = row % heads;
  std::vector<float> norms, v(static_cast<size_t>(dim)), product(static_cast<size_t>(args.hidden));
  for (int t = 0; t < args.prompt_len[b]; ++t) {
    RowsView(args.values).load(b, t, h, dim, v.data());
    std::fill(product.begin(), product.end(), 0.0f);
    for (int d = 0; d < dim; ++d) {
      const float* row_of_w = w + int64_t{d} * args.hidden;
      for (int i = 0; i < args.hidden; ++i) {
        product[static_cast<size_t>(i)] += v[static_cast<size_t>(d)] * row_of_w[i];
      }
    }
    double square = 0.0;
    for (const float x : product) square += double{x} * x;
    norms.push_back(static_cast<float>(std::sqrt(square)));
  }
  return norms;
}

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const Math& math) {
  return std::make_unique<LaProx>(args, math);
}

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) {
  return make(args, {kRefWindowMath, explicit_norms});
}

}  // namespace sikv::laprox
