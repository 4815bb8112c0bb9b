#include "selectors/rabitq/rabitq.h"

#include "plugins/sdk/prompt_queries.h"

namespace sikv::rabitq {
namespace {

struct State {
  std::vector<float> center;         // [D] mean key
  std::vector<float> query_centers;  // [G, D] mean queries, or empty
  SignCodes signs;
  ChannelPages terms;  // factor, then, with mean queries, <mean query, k - center> per head

  int64_t tokens() const { return signs.tokens(); }
  uint64_t bytes() const {
    return (center.size() + query_centers.size()) * sizeof(float) + signs.bytes() + terms.bytes();
  }
};

class RaBitQ : public KeySelector<State> {
 public:
  RaBitQ(const CreateArgs& args, const RowMath& math, SignLogits sign_logits)
      : KeySelector(args, math, args.options.integer("fit_tokens")),
        group_(args.group()),
        planes_(static_cast<int>(args.options.integer("query_bits"))),
        center_queries_(args.options.flag("center_queries")),
        sign_logits_(sign_logits) {}

 protected:
  void fit(const PromptRow& prompt, State& state) override {
    const int dim = prompt.head_dim;
    state.center = mean_row(prompt.keys.data(), prompt.count, dim);
    if (!center_queries_) return;
    const PromptQueries window(prompt.args, shape().num_query_heads);
    const int count = window.count();
    std::vector<float> groups(static_cast<size_t>(count * group_ * dim)),
        queries(static_cast<size_t>(count * dim));
    for (int w = 0; w < count; ++w) {
      window.load_group(prompt.row, count - w, groups.data() + int64_t{w} * group_ * dim);
    }
    for (int g = 0; g < group_; ++g) {
      for (int w = 0; w < count; ++w) {
        std::copy_n(groups.data() + (int64_t{w} * group_ + g) * dim, dim, queries.data() + w * dim);
      }
      const std::vector<float> center = mean_row(queries.data(), count, dim);
      state.query_centers.insert(state.query_centers.end(), center.begin(), center.end());
    }
  }

  void add(const float* keys, int count, int64_t first, State& state) override {
    const int dim = shape().head_dim;
    std::vector<float> terms(1);
    for (int t = 0; t < count; ++t) {
      const float* key = keys + t * dim;
      const Code code = encode(key, state.center.data(), dim);
      state.signs.put(first + t, code.y, dim);
      terms.assign(1, code.factor);
      for (size_t at = 0; at < state.query_centers.size(); at += static_cast<size_t>(dim)) {
        float shift = 0.0f;
        for (int d = 0; d < dim; ++d) {
          shift += state.query_centers[at + static_cast<size_t>(d)] *
                   (key[d] - state.center[static_cast<size_t>(d)]);
        }
        terms.push_back(shift);
      }
      state.terms.put(SIKV_FP16, static_cast<int>(terms.size()), first + t, terms.data());
    }
  }

  // Up to <q, center>, which is the same for all tokens.
  int score(const RowQuery& query, const State& state, float* logits, int64_t stride) override {
    const int dim = query.head_dim;
    std::vector<float> q(query.heads, query.heads + query.group * dim);
    for (size_t i = 0; i < state.query_centers.size(); ++i) q[i] -= state.query_centers[i];
    for (int g = 0; g < query.group; ++g) rotation::forward(q.data() + g * dim, dim);
    const SlicedQueries sliced = slice_queries(q.data(), query.group, dim, planes_);
    sign_logits_({state.signs, sliced, query.group, query.tokens, query.scale, state.terms}, logits,
                 stride);
    return query.group;
  }

  uint64_t scan_bytes(const RowQuery& query, const State& state) const override {
    return static_cast<uint64_t>(query.tokens) *
           static_cast<uint64_t>(8 * state.signs.words() + 2 * state.terms.channels());
  }

 private:
  int group_, planes_;
  bool center_queries_;
  SignLogits sign_logits_;
};

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math,
                               SignLogits sign_logits) {
  return std::make_unique<RaBitQ>(args, math, sign_logits);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return make(args, kRefRowMath, sign_logits_ref);
}

}  // namespace sikv::rabitq
