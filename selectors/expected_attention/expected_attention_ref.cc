#include <cmath>
#include <vector>

#include "kernels/common/prompt_eviction.h"
#include "plugins/sdk/prompt_queries.h"
#include "selectors/expected_attention/expected_attention.h"

namespace sikv::expected_attention {
namespace {

// What pairs of channels are turned by: c + i s each.
struct Turn {
  std::vector<double> c, s;  // [D / 2]

  void apply(double* x, Rope rope) const {
    const int half = static_cast<int>(c.size());
    for (int i = 0; i < half; ++i) {
      turn_pair(x, 2 * half, rope, i, c[static_cast<size_t>(i)], s[static_cast<size_t>(i)]);
    }
  }
};

// What the queries of one head are expected to be: their mean [D] and covariance [D, D].
struct Expected {
  std::vector<double> mean, covariance;

  // log E exp(q.k / sqrt(D)) for a normal q.
  double log_expectation(const std::vector<float>& key) const {
    const size_t size = key.size();
    double linear = 0.0, quadratic = 0.0;
    std::vector<double> projected(size, 0.0);
    for (size_t x = 0; x < size; ++x) {
      linear += mean[x] * key[x];
      for (size_t y = 0; y < size; ++y) projected[y] += covariance[x * size + y] * key[x];
    }
    for (size_t x = 0; x < size; ++x) quadratic += projected[x] * key[x];
    const double dim = static_cast<double>(size);
    return linear / std::sqrt(dim) + quadratic / (2.0 * dim);
  }
};

class ExpectedAttention final : public PromptEviction {
 public:
  explicit ExpectedAttention(const CreateArgs& args)
      : PromptEviction(args, 0),
        budget_(args.options.budget("budget")),
        sinks_(args.options.integer("sinks")),
        future_(args.options.integer("future")),
        epsilon_(args.options.number("epsilon")),
        value_norm_(args.options.flag("value_norm")),
        rope_(rope_of(args)),
        frequencies_(rope_frequencies(args.shape.head_dim, args.shape.rope_theta, rope_)) {}

 private:
  std::vector<float> score_row(const sikv_observe_args& args, const CacheView& view,
                               int row) const override {
    const int heads = view.num_kv_heads(), dim = view.head_dim();
    const int b = row / heads, h = row % heads;
    const int64_t prompt = args.prompt_len[b], sinks = std::min<int64_t>(sinks_, prompt);
    const auto tokens = static_cast<size_t>(prompt - sinks);
    std::vector<double> probability(tokens, 0.0), logits(tokens);
    std::vector<float> row_floats(static_cast<size_t>(dim));
    for (const Expected& query : expect(args, view, row, prompt, sinks)) {
      for (size_t t = 0; t < tokens; ++t) {
        const int token = static_cast<int>(sinks) + static_cast<int>(t);
        RowsView(args.keys).load(b, token, h, dim, row_floats.data());
        logits[t] = query.log_expectation(row_floats);
      }
      if (tokens == 0) break;
      const double highest = *std::max_element(logits.begin(), logits.end());
      double sum = 0.0;
      for (double& x : logits) sum += x = std::exp(x - highest);
      for (size_t t = 0; t < tokens; ++t) probability[t] += logits[t] / sum / group();
    }
    std::vector<float> scores(static_cast<size_t>(prompt), kAlwaysKept);
    for (size_t t = 0; t < tokens; ++t) {
      const int token = static_cast<int>(sinks) + static_cast<int>(t);
      double norm = 1.0;
      if (value_norm_) {
        RowsView(args.values).load(b, token, h, dim, row_floats.data());
        norm = 0.0;
        for (const float x : row_floats) norm += double{x} * x;
        norm = std::sqrt(norm);
      }
      scores[static_cast<size_t>(token)] = static_cast<float>((probability[t] + epsilon_) * norm);
    }
    return scores;
  }

  int64_t kept(int, int, int64_t prompt, int64_t, int64_t) const override {
    return budget_.tokens(prompt);
  }

  Turn turn(double position) const {
    Turn turn;
    for (const double frequency : frequencies_) {
      turn.c.push_back(std::cos(position * frequency));
      turn.s.push_back(std::sin(position * frequency));
    }
    return turn;
  }

  // The mean of the turns of all positions behind the prompt.
  Turn future_turn(int64_t prompt) const {
    const size_t half = frequencies_.size();
    Turn mean{std::vector<double>(half, 0.0), std::vector<double>(half, 0.0)};
    for (int64_t p = prompt; p < prompt + future_; ++p) {
      const Turn at = turn(static_cast<double>(p));
      for (size_t i = 0; i < half; ++i) {
        mean.c[i] += at.c[i] / static_cast<double>(future_);
        mean.s[i] += at.s[i] / static_cast<double>(future_);
      }
    }
    return mean;
  }

  // Per head of the group: of the prompt's queries without their rotation, turned to where the next
  // ones will be.
  std::vector<Expected> expect(const sikv_observe_args& args, const CacheView& view, int row,
                               int64_t prompt, int64_t sinks) const {
    const int heads = view.num_kv_heads(), dim = view.head_dim();
    const auto size = static_cast<size_t>(dim);
    const double count = static_cast<double>(std::max<int64_t>(prompt - sinks, 1));
    std::vector<Expected> group_of(
        static_cast<size_t>(group()),
        {std::vector<double>(size, 0.0), std::vector<double>(size * size, 0.0)});
    const PromptQueries queries(args, group() * heads);
    std::vector<float> loaded(size * static_cast<size_t>(group()));
    std::vector<double> q(size);
    for (int64_t p = sinks; p < prompt; ++p) {
      const Turn back = turn(-static_cast<double>(p));
      queries.load_group(row, prompt - p, loaded.data());
      for (int g = 0; g < group(); ++g) {
        std::copy_n(loaded.begin() + int64_t{g} * dim, dim, q.begin());
        back.apply(q.data(), rope_);
        Expected& of_head = group_of[static_cast<size_t>(g)];
        for (size_t x = 0; x < size; ++x) {
          const double scaled = q[x] / count;
          of_head.mean[x] += scaled;
          for (size_t y = 0; y < size; ++y) of_head.covariance[x * size + y] += scaled * q[y];
        }
      }
    }
    const Turn future = future_turn(prompt);
    for (Expected& of_head : group_of) finish(future, of_head);
    return group_of;
  }

  // `query` holds the mean and the second moments, which become the covariance C; then R mean and
  // R C R^T: rows, then columns, of the symmetric C.
  void finish(const Turn& future, Expected& query) const {
    const size_t size = query.mean.size();
    for (size_t x = 0; x < size; ++x) {
      for (size_t y = 0; y < size; ++y) {
        query.covariance[x * size + y] -= query.mean[x] * query.mean[y];
      }
    }
    future.apply(query.mean.data(), rope_);
    for (int side = 0; side < 2; ++side) {
      for (size_t x = 0; x < size; ++x) future.apply(query.covariance.data() + x * size, rope_);
      for (size_t x = 0; x < size; ++x) {
        for (size_t y = 0; y < x; ++y) {
          std::swap(query.covariance[x * size + y], query.covariance[y * size + x]);
        }
      }
    }
  }

  Budget budget_;
  int64_t sinks_, future_;
  double epsilon_;
  bool value_norm_;
  Rope rope_;
  std::vector<double> frequencies_;  // [D / 2]
};

}  // namespace

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) {
  return std::make_unique<ExpectedAttention>(args);
}

}  // namespace sikv::expected_attention
