#include <algorithm>
#include <cmath>
#include <functional>

#include "kernels/common/head_mean.h"
#include "kernels/common/project_value.h"
#include "kernels/common/prompt_eviction.h"
#include "selectors/laprox/laprox.h"

namespace sikv::laprox {
namespace {

class LaProx final : public PromptEviction {
 public:
  LaProx(const CreateArgs& args, const Math& math)
      : PromptEviction(args, static_cast<int>(args.options.integer("window"))),
        ranking_(args.options, math.window),
        norm_(math.norm),
        budget_(args.options.budget("budget")),
        of_attention_(args.options.choice("group") == "attention"),
        share_heads_(args.options.flag("share_heads")),
        rows_(args.shape) {}

  void begin_sequence(int sequence) override {
    PromptEviction::begin_sequence(sequence);
    rows_.reset(sequence);
  }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch launch) override {
    const int heads = view.num_kv_heads(), dim = view.head_dim();
    // Once per query head, whatever the number of sequences.
    norms_of_heads_.resize(static_cast<size_t>(shape().num_query_heads));
    parallel_for(host(), shape().num_query_heads, [&](int64_t head, int32_t) {
      norms_of_heads_[static_cast<size_t>(head)] =
          norm_(args.w_o + head * dim * args.hidden, dim, args.hidden);
    });
    PromptEviction::observe(args, view, launch);
    norms_of_heads_.clear();  // w_o is there for this call
    for (int first = 0; share_heads_ && first < view.num_rows(); first += heads) {
      average_heads(
          first, heads, [&](int row) -> auto& { return prompt_scores(view.layer(), row); });
    }
    normalise(view);
    for (int row = 0; row < view.num_rows(); ++row) note_row(args, view, row);
    if (view.layer() == shape().num_layers - 1) {
      for (int b = 0; b < view.num_sequences(); ++b) split(b);
    }
  }

 private:
  // What a row brings to the split, besides its scores.
  struct Row {
    std::vector<int32_t> pinned;  // these do not compete
    int encoded = 0;
    int64_t share = 0;  // of the budget, for those that compete
    int64_t kept = 0;   // of them, once all layers are there
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
    const RowsView values(args.values);
    std::vector<float> scores(prompt, 0.0f), v(static_cast<size_t>(dim));
    for (int g = 0; g < group(); ++g) {  // outside: its matrix stays in the cache
      const auto& norm = norms_of_heads_[static_cast<size_t>(row % heads * group() + g)];
      const auto& of_head = squares[static_cast<size_t>(g % pools)];
      for (size_t t = 0; t < prompt; ++t) {
        values.load(row / heads, static_cast<int>(t), row % heads, dim, v.data());
        scores[t] += std::sqrt(of_head[t]) * norm(v.data()) / static_cast<float>(group());
      }
    }
    return ranking_.pool(std::move(scores), window());
  }

  int64_t kept(int layer, int row, int64_t, int64_t, int64_t in_window) const override {
    return in_window + rows_.at(layer, row).kept;
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

  void note_row(const sikv_observe_args& args, const CacheView& view, int row) {
    const auto pinned = view.pinned_slots(row);
    Row& to = rows_.at(view.layer(), row);
    to = {{pinned.begin(), pinned.end()}, view.encoded_len(row), 0, 0};
    int64_t in_window = 0;
    for_each_score(view.layer(), row, [&](float score) { in_window += score == kAlwaysKept; });
    const int64_t budget = budget_.tokens(args.prompt_len[row / view.num_kv_heads()]);
    to.share = std::max<int64_t>(budget - in_window, 0);
  }

  // visit(score) of every token in pages that is not pinned; +inf in the window.
  template <typename Visit>
  void for_each_score(int layer, int row, Visit&& visit) {
    const std::vector<float>& scores = prompt_scores(layer, row);
    const Row& of = rows_.at(layer, row);
    for_each_unpinned(of.encoded, of.pinned,
                      [&](int32_t slot) { visit(scores[static_cast<size_t>(slot)]); });
  }

  // The best candidates of all layers and heads of a sequence share what is left of its budgets.
  // Equal scores: the lower layer first, then the lower head.
  void split(int sequence) {
    const int heads = shape().num_kv_heads;
    const auto for_each_row = [&](auto&& visit) {
      for (int l = 0; l < shape().num_layers; ++l) {
        for (int h = 0; h < heads; ++h) visit(l, sequence * heads + h);
      }
    };
    std::vector<float> all;
    int64_t total = 0;
    for_each_row([&](int layer, int row) {
      total += rows_.at(layer, row).share;
      for_each_score(layer, row, [&](float score) {
        if (score < kAlwaysKept) all.push_back(score);
      });
    });
    total = std::min(total, std::ssize(all));
    if (total == 0) return;
    const auto last = all.begin() + total - 1;
    std::nth_element(all.begin(), last, all.end(), std::greater<>());
    const float cut = *last;
    int64_t ties = std::count(all.begin(), last + 1, cut);
    for_each_row([&](int layer, int row) {
      int64_t above = 0, equal = 0;
      for_each_score(layer, row, [&](float score) {
        above += score > cut && score < kAlwaysKept;
        equal += score == cut;
      });
      const int64_t taken = std::min(equal, ties);
      ties -= taken;
      rows_.at(layer, row).kept = above + taken;
    });
  }

  WindowRanking ranking_;
  decltype(Math::norm) norm_;
  std::vector<ProjectedNorm> norms_of_heads_;  // while a layer is observed
  Budget budget_;
  bool of_attention_, share_heads_;
  RowState<Row> rows_;
};

}  // namespace

ProjectedNorm explicit_norm(const float* w, int head_dim, int hidden) {
  return [=](const float* v) {
    std::vector<float> product(static_cast<size_t>(hidden));
    project_value(v, w, head_dim, hidden, product.data());
    double square = 0.0;
    for (const float x : product) square += double{x} * x;
    return static_cast<float>(std::sqrt(square));
  };
}

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const Math& math) {
  return std::make_unique<LaProx>(args, math);
}

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) {
  return make(args, {kRefWindowMath, explicit_norm});
}

}  // namespace sikv::laprox
