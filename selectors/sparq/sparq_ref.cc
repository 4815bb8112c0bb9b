#include <cmath>

#include "kernels/common/channels_option.h"
#include "selectors/sparq/sparq.h"

namespace sikv::sparq {
namespace {

struct State {
  ChannelPages keys;

  int64_t tokens() const { return keys.tokens(); }
  uint64_t bytes() const { return keys.bytes(); }
};

class Sparq : public KeySelector<State> {
 public:
  Sparq(const CreateArgs& args, const RowMath& math)
      : KeySelector(args, math, 0),
        channels_(channels_of(args)),
        local_(args.options.integer("local")) {}

 protected:
  void add(const float* keys, int count, int64_t first, State& state) override {
    const int dim = shape().head_dim;
    for (int t = 0; t < count; ++t) state.keys.put(shape().dtype, dim, first + t, keys + t * dim);
  }

  // The group's heads read one set of channels and their tempered scores are summed, so their
  // queries can be summed first.
  int score(const RowQuery& query, const State& state, float* logits, int64_t stride) override {
    std::vector<double> size(static_cast<size_t>(query.head_dim));
    for (int i = 0; i < query.group * query.head_dim; ++i) {
      size[static_cast<size_t>(i % query.head_dim)] += std::abs(query.heads[i]);
    }
    const std::vector<int32_t> read = largest_channels(size, channels_);
    std::vector<float> q(read.size());
    for (int g = 0; g < query.group; ++g) {
      const float* head = query.heads + g * query.head_dim;
      const float scale = query.scale / temperature(head, query.head_dim, read);
      for (size_t c = 0; c < read.size(); ++c) q[c] += head[read[c]] * scale;
    }
    math().channel_logits({state.keys, read, q.data(), 1, query.tokens}, logits, stride);
    return 1;
  }

  uint64_t scan_bytes(const RowQuery& query, const State&) const override {
    return static_cast<uint64_t>(query.tokens * channels_ * sikv_dtype_bytes(shape().dtype));
  }

  void force(const RowQuery& query, float* scores) const override {
    take_newest(query, local_, query.budget, scores);
  }

 private:
  // What 1 / sqrt(D) is divided by: the root of the share of |q| that is read.
  static float temperature(const float* q, int dim, const std::vector<int32_t>& read) {
    double all = 0.0, part = 0.0;
    for (int d = 0; d < dim; ++d) all += std::abs(q[d]);
    for (int32_t channel : read) part += std::abs(q[channel]);
    return part > 0.0 ? static_cast<float>(std::sqrt(part / all)) : 1.0f;
  }

  int channels_;
  int64_t local_;
};

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math) {
  return std::make_unique<Sparq>(args, math);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) { return make(args, kRefRowMath); }

}  // namespace sikv::sparq
