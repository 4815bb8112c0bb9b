#include "selectors/self_indexing_attention/self_indexing_attention.h"

namespace sikv::self_indexing_attention {
namespace {

struct State {
  SignCodes signs;
  ChannelPages norms;

  int64_t tokens() const { return signs.tokens(); }
  uint64_t bytes() const { return signs.bytes() + norms.bytes(); }
};

class SelfIndexingAttention : public KeySelector<State> {
 public:
  SelfIndexingAttention(const CreateArgs& args, const RowMath& math, SignLogits sign_logits)
      : KeySelector(args, math, 0),
        planes_(static_cast<int>(args.options.integer("query_bits"))),
        sign_logits_(sign_logits) {}

 protected:
  void add(const float* keys, int count, int64_t first, State& state) override {
    const int dim = shape().head_dim;
    float y[kMaxHeadDim];
    for (int t = 0; t < count; ++t) {
      std::copy_n(keys + t * dim, dim, y);
      rotation::forward(y, dim);
      state.signs.put(first + t, y, dim);
      float squares = 0.0f;
      for (int d = 0; d < dim; ++d) squares += y[d] * y[d];
      const float norm = std::sqrt(squares);
      state.norms.put(SIKV_FP16, 1, first + t, &norm);
    }
  }

  int score(const RowQuery& query, const State& state, float* logits, int64_t stride) override {
    const int dim = query.head_dim;
    std::vector<float> q(query.heads, query.heads + query.group * dim);
    for (int g = 0; g < query.group; ++g) rotation::forward(q.data() + g * dim, dim);
    const SlicedQueries sliced = slice_queries(q.data(), query.group, dim, planes_);
    // Each channel of the code stands for norm / sqrt(D).
    const float scale = query.scale / std::sqrt(static_cast<float>(dim));
    sign_logits_({state.signs, sliced, query.group, query.tokens, scale, state.norms}, logits,
                 stride);
    return query.group;
  }

  uint64_t scan_bytes(const RowQuery& query, const State& state) const override {
    return static_cast<uint64_t>(query.tokens) * static_cast<uint64_t>(8 * state.signs.words() + 2);
  }

 private:
  int planes_;
  SignLogits sign_logits_;
};

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math,
                               SignLogits sign_logits) {
  return std::make_unique<SelfIndexingAttention>(args, math, sign_logits);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return make(args, kRefRowMath, sign_logits_ref);
}

}  // namespace sikv::self_indexing_attention
