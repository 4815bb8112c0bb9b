#include <optional>

#include "kernels/common/channels_option.h"
#include "kernels/common/pca.h"
#include "kernels/common/pca_file.h"
#include "plugins/layouts/arithmetic.h"
#include "selectors/loki/loki.h"

namespace sikv::loki {
namespace {

struct State {
  std::vector<float> axes;  // [D, channels] the first axes, side by side
  ChannelPages projected;   // keys on these axes

  int64_t tokens() const { return projected.tokens(); }
  uint64_t bytes() const { return axes.size() * sizeof(float) + projected.bytes(); }
};

class Loki : public KeySelector<State> {
 public:
  Loki(const CreateArgs& args, const RowMath& math)
      : KeySelector(args, math, args.options.integer("fit_tokens")),
        channels_(channels_of(args)),
        all_(static_cast<size_t>(channels_)) {
    std::iota(all_.begin(), all_.end(), 0);
    const std::string path(args.options.text("pca"));
    if (!path.empty()) file_ = read_pca_file(path, args.shape, args.layers);
  }

 protected:
  void fit(const PromptRow& prompt, State& state) override {
    const int dim = prompt.head_dim;
    std::vector<float> fitted;
    if (!file_) fitted = pca(prompt.keys, prompt.count, dim).axes;
    const float* axes =
        file_ ? file_->axes_of(prompt.layer, prompt.row % shape().num_kv_heads) : fitted.data();
    state.axes.resize(static_cast<size_t>(dim * channels_));
    for (int a = 0; a < channels_; ++a) {
      for (int d = 0; d < dim; ++d) {
        state.axes[static_cast<size_t>(d * channels_ + a)] = axes[a * dim + d];
      }
    }
  }

  void add(const float* keys, int count, int64_t first, State& state) override {
    float projected[kMaxHeadDim];
    for (int t = 0; t < count; ++t) {
      project(keys + t * shape().head_dim, state, projected);
      state.projected.put(shape().dtype, channels_, first + t, projected);
    }
  }

  int score(const RowQuery& query, const State& state, float* logits, int64_t stride) override {
    std::vector<float> q(static_cast<size_t>(query.group * channels_));
    for (int g = 0; g < query.group; ++g) {
      float* head = q.data() + g * channels_;
      project(query.heads + g * query.head_dim, state, head);
      for (int c = 0; c < channels_; ++c) head[c] *= query.scale;
    }
    math().channel_logits({state.projected, all_, q.data(), query.group, query.tokens}, logits,
                          stride);
    return query.group;
  }

  uint64_t scan_bytes(const RowQuery& query, const State& state) const override {
    return state.axes.size() * sizeof(float) +
           static_cast<uint64_t>(query.tokens * channels_ * sikv_dtype_bytes(shape().dtype));
  }

 private:
  // out [channels] = the first coordinates of x [D] on the axes. Their mean is not taken off: it
  // moves all logits of a query alike.
  void project(const float* x, const State& state, float* out) const {
    std::fill_n(out, channels_, 0.0f);
    const float* axes = state.axes.data();
    for (int d = 0; d < shape().head_dim; ++d, axes += channels_) {
      for (int c = 0; c < channels_; ++c) out[c] += x[d] * axes[c];
    }
  }

  int channels_;
  std::vector<int32_t> all_;  // 0 .. channels - 1
  std::optional<PcaFile> file_;
};

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math) {
  return std::make_unique<Loki>(args, math);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) { return make(args, kRefRowMath); }

}  // namespace sikv::loki
