#include "kernels/common/gaussian_directions.h"
#include "selectors/sign_lsh/sign_lsh.h"

namespace sikv::sign_lsh {
namespace {

struct State {
  std::vector<float> center;  // [D], or empty
  SignCodes hashes;
  ChannelPages norms;

  int64_t tokens() const { return hashes.tokens(); }
  uint64_t bytes() const { return center.size() * sizeof(float) + hashes.bytes() + norms.bytes(); }
};

class SignLsh : public KeySelector<State> {
 public:
  SignLsh(const CreateArgs& args, const RowMath& math, SignLogits sign_logits)
      : KeySelector(args, math, args.options.integer("fit_tokens")),
        bits_(static_cast<int>(args.options.integer("bits"))),
        norm_(args.options.flag("norm")),
        center_(args.options.flag("center")),
        sign_logits_(sign_logits),
        // [bits, D]: bit i of a hash is the side of hyperplane i.
        planes_(gaussian_directions(static_cast<uint64_t>(args.options.integer("seed")),
                                    int64_t{bits_} * args.shape.head_dim)) {}

 protected:
  void fit(const PromptRow& prompt, State& state) override {
    if (center_) state.center = mean_row(prompt.keys.data(), prompt.count, prompt.head_dim);
  }

  void add(const float* keys, int count, int64_t first, State& state) override {
    const int dim = shape().head_dim;
    std::vector<float> key, sides(static_cast<size_t>(bits_));
    for (int t = 0; t < count; ++t) {
      key.assign(keys + t * dim, keys + (t + 1) * dim);
      for (size_t d = 0; d < state.center.size(); ++d) key[d] -= state.center[d];
      project(key.data(), sides.data());
      state.hashes.put(first + t, sides.data(), bits_);
      if (!norm_) continue;
      float squares = 0.0f;
      for (const float x : key) squares += x * x;
      const float norm = std::sqrt(squares);
      state.norms.put(SIKV_FP16, 1, first + t, &norm);
    }
  }

  // The heads' hashes vote with equal weight, however long a query is.
  int score(const RowQuery& query, const State& state, float* logits, int64_t stride) override {
    std::vector<float> sides(static_cast<size_t>(query.group * bits_));
    for (int g = 0; g < query.group; ++g) {
      project(query.heads + g * query.head_dim, sides.data() + g * bits_);
    }
    SlicedQueries hashes = slice_queries(sides.data(), query.group, bits_, 1);
    std::fill(hashes.step.begin(), hashes.step.end(), 1.0f / static_cast<float>(bits_));
    sign_logits_({state.hashes, hashes, query.group, query.tokens, 1.0f, state.norms}, logits,
                 stride);
    for (int g = 1; g < query.group; ++g) {
      for (int64_t t = 0; t < query.tokens; ++t) logits[t] += logits[g * stride + t];
    }
    return 1;
  }

  uint64_t scan_bytes(const RowQuery& query, const State& state) const override {
    return static_cast<uint64_t>(query.tokens) *
           static_cast<uint64_t>(8 * state.hashes.words() + 2 * state.norms.channels());
  }

 private:
  void project(const float* x, float* sides) const {
    const int dim = shape().head_dim;
    const float* plane = planes_.data();
    for (int i = 0; i < bits_; ++i, plane += dim) {
      float sum = 0.0f;
      for (int d = 0; d < dim; ++d) sum += plane[d] * x[d];
      sides[i] = sum;
    }
  }

  int bits_;
  bool norm_, center_;
  SignLogits sign_logits_;
  std::vector<float> planes_;
};

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math,
                               SignLogits sign_logits) {
  return std::make_unique<SignLsh>(args, math, sign_logits);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return make(args, kRefRowMath, sign_logits_ref);
}

}  // namespace sikv::sign_lsh
