#include <cmath>

#include "kernels/common/channels_option.h"
#include "plugins/layouts/arithmetic.h"
#include "plugins/sdk/prompt_queries.h"
#include "selectors/double_sparsity/double_sparsity.h"

namespace sikv::double_sparsity {
namespace {

struct State {
  std::vector<int32_t> channels;  // heavy ones, ascending
  ChannelPages labels;            // these channels of every key, as they are

  int64_t tokens() const { return labels.tokens(); }
  uint64_t bytes() const { return channels.size() * sizeof(int32_t) + labels.bytes(); }
};

// weight [D] times the mean over rows [n, D] of |x|.
void weigh(const std::vector<float>& rows, std::vector<double>& weight) {
  const size_t dim = weight.size();
  if (rows.empty()) return;
  std::vector<double> sum(dim);
  for (size_t i = 0; i < rows.size(); ++i) sum[i % dim] += std::abs(double{rows[i]});
  for (size_t d = 0; d < dim; ++d) weight[d] *= sum[d] / static_cast<double>(rows.size() / dim);
}

class DoubleSparsity : public KeySelector<State> {
 public:
  DoubleSparsity(const CreateArgs& args, const RowMath& math)
      : KeySelector(args, math, args.options.integer("fit_tokens")),
        channels_(channels_of(args)),
        by_query_(args.options.choice("ranking") != "k"),
        by_key_(args.options.choice("ranking") != "q"),
        all_(static_cast<size_t>(channels_)) {
    std::iota(all_.begin(), all_.end(), 0);
  }

 protected:
  void fit(const PromptRow& prompt, State& state) override {
    std::vector<double> weight(static_cast<size_t>(prompt.head_dim), 1.0);
    if (by_key_) weigh(prompt.keys, weight);
    if (by_query_) weigh(window_queries(prompt), weight);
    state.channels = largest_channels(weight, channels_);
  }

  void add(const float* keys, int count, int64_t first, State& state) override {
    float label[kMaxHeadDim];
    for (int t = 0; t < count; ++t) {
      const float* key = keys + t * shape().head_dim;
      for (int c = 0; c < channels_; ++c) label[c] = key[state.channels[static_cast<size_t>(c)]];
      state.labels.put(shape().dtype, channels_, first + t, label);
    }
  }

  // Divided by sqrt(channels) where the whole product is divided by sqrt(D).
  int score(const RowQuery& query, const State& state, float* logits, int64_t stride) override {
    const float scale =
        query.scale * std::sqrt(static_cast<float>(query.head_dim) / static_cast<float>(channels_));
    std::vector<float> q;
    for (int g = 0; g < query.group; ++g) {
      for (int32_t channel : state.channels) {
        q.push_back(query.heads[g * query.head_dim + channel] * scale);
      }
    }
    math().channel_logits({state.labels, all_, q.data(), query.group, query.tokens}, logits,
                          stride);
    return query.group;
  }

  uint64_t scan_bytes(const RowQuery& query, const State&) const override {
    return static_cast<uint64_t>(query.tokens * channels_ * sikv_dtype_bytes(shape().dtype));
  }

 private:
  // [W * G, D]: the last queries of the prompt that the row's KV head answers.
  std::vector<float> window_queries(const PromptRow& prompt) const {
    const PromptQueries queries(prompt.args, shape().num_query_heads);
    const int window = queries.count(),
              size = shape().num_query_heads / shape().num_kv_heads * prompt.head_dim;
    std::vector<float> rows(static_cast<size_t>(window * size));
    for (int w = 0; w < window; ++w) {
      queries.load_group(prompt.row, window - w, rows.data() + int64_t{w} * size);
    }
    return rows;
  }

  int channels_;
  bool by_query_, by_key_;
  std::vector<int32_t> all_;  // 0 .. channels - 1
};

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math) {
  return std::make_unique<DoubleSparsity>(args, math);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) { return make(args, kRefRowMath); }

}  // namespace sikv::double_sparsity
