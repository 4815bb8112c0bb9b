#include <cmath>
#include <optional>

#include "kernels/common/kmeans.h"
#include "selectors/saap/saap.h"

namespace sikv::saap {
namespace {

struct State {
  Centroids centroids;            // of norm 1
  std::vector<float> lengths;     // [C] mean norms of their keys; empty where a network scores
  std::vector<uint16_t> buckets;  // by position
  int layer = 0, head = 0;

  int64_t tokens() const { return std::ssize(buckets); }
  uint64_t bytes() const {
    return centroids.bytes() + lengths.size() * sizeof(float) + buckets.size() * sizeof(uint16_t);
  }
};

float norm(const float* x, int dim) {
  float squares = 0.0f;
  for (int d = 0; d < dim; ++d) squares += x[d] * x[d];
  return std::sqrt(squares);
}

class Saap : public KeySelector<State> {
 public:
  Saap(const CreateArgs& args, const RowMath& row_math, const Math& math)
      : KeySelector(args, row_math, args.options.integer("fit_tokens")),
        saap_(math),
        clusters_(static_cast<int>(args.options.integer("clusters"))),
        iterations_(static_cast<int>(args.options.integer("iterations"))),
        rope_(rope_of(args)),
        frequencies_(rope_frequencies(args.shape.head_dim, args.shape.rope_theta, rope_)) {
    const std::string path(args.options.text("network"));
    if (!path.empty()) network_ = read_network(path, args.shape, rope_);
  }

 protected:
  void fit(const PromptRow& prompt, State& state) override {
    const int dim = prompt.head_dim;
    state.layer = prompt.layer;
    state.head = prompt.row % shape().num_kv_heads;
    if (network_) {
      const auto floats = static_cast<size_t>(network_->clusters) * static_cast<size_t>(dim);
      state.centroids = Centroids({network_->centroids(state.layer, state.head), floats},
                                  network_->clusters, dim);
      return;
    }
    std::vector<float> keys = prompt.keys;
    const std::vector<float> norms = to_routing_space(keys.data(), prompt.count, 0);
    const int clusters = clusters_ > 0 ? clusters_ : std::clamp((prompt.count + 15) / 16, 1, 1024);
    const KMeans fitted =
        kmeans(keys, prompt.count, dim,
               {.centroids = clusters, .iterations = iterations_, .spherical = true});
    state.centroids = Centroids(fitted.centroids, fitted.count, dim);
    state.lengths.resize(static_cast<size_t>(fitted.count));
    std::vector<float> members(state.lengths.size());
    for (size_t t = 0; t < norms.size(); ++t) {
      const auto c = static_cast<size_t>(fitted.assignment[t]);
      state.lengths[c] += norms[t];
      members[c] += 1.0f;
    }
    for (size_t c = 0; c < members.size(); ++c) state.lengths[c] /= std::max(members[c], 1.0f);
  }

  void add(const float* keys, int count, int64_t first, State& state) override {
    std::vector<float> block(keys, keys + int64_t{count} * shape().head_dim);
    to_routing_space(block.data(), count, first);
    std::vector<float> scratch(static_cast<size_t>(state.centroids.count()));
    state.buckets.resize(std::max(state.buckets.size(), static_cast<size_t>(first + count)));
    for (int t = 0; t < count; ++t) {
      state.buckets[static_cast<size_t>(first + t)] = static_cast<uint16_t>(
          state.centroids.nearest(block.data() + t * shape().head_dim, scratch.data()));
    }
  }

  // Every token gets its bucket's score; the tie rule then takes whole buckets.
  int score(const RowQuery& query, const State& state, float* logits, int64_t) override {
    const int dim = query.head_dim;
    const auto clusters = static_cast<size_t>(state.centroids.count());
    const int64_t newest = query.tokens + query.view.tail_len(query.row / shape().num_kv_heads) - 1;
    std::vector<float> q, z(clusters), hidden, scores(clusters);
    for (int g = 0; g < query.group; ++g) {
      q.assign(query.heads + g * dim, query.heads + (g + 1) * dim);
      undo_rope(q.data(), newest);
      if (network_) {
        const int units = network_->hidden;
        const float* w = network_->query_head(state.layer, state.head * query.group + g);
        hidden.resize(static_cast<size_t>(units));
        saap_.affine(q.data(), dim, w, w + int64_t{dim} * units, units, hidden.data());
        for (float& x : hidden) x = std::max(x, 0.0f);
        w += int64_t{dim} * units + units;
        saap_.affine(hidden.data(), units, w, w + int64_t{units} * network_->clusters,
                     network_->clusters, z.data());
      } else {
        saap_.affine(q.data(), dim, state.centroids.data(), nullptr, state.centroids.count(),
                     z.data());
        for (size_t c = 0; c < clusters; ++c) z[c] *= query.scale * state.lengths[c];
      }
      const float highest = *std::max_element(z.begin(), z.end());
      float sum = 0.0f;
      for (float& x : z) sum += x = std::exp(x - highest);
      for (size_t c = 0; c < clusters; ++c) scores[c] += z[c] / sum;
    }
    saap_.spread(state.buckets.data(), query.tokens, scores.data(), logits);
    return 1;
  }

  uint64_t scan_bytes(const RowQuery& query, const State& state) const override {
    const int64_t routing = network_ ? query.group * network_->head_floats()
                                     : int64_t{state.centroids.count()} * query.head_dim;
    return static_cast<uint64_t>(routing) * sizeof(float) +
           static_cast<uint64_t>(query.tokens) * sizeof(uint16_t);
  }

 private:
  // Removes from x [D] what the position has turned it by.
  void undo_rope(float* x, int64_t position) const {
    if (rope_ == Rope::kKept) return;
    for (size_t i = 0; i < frequencies_.size(); ++i) {
      const double angle = static_cast<double>(position) * frequencies_[i];
      turn_pair(x, shape().head_dim, rope_, static_cast<int>(i),
                static_cast<float>(std::cos(angle)), static_cast<float>(-std::sin(angle)));
    }
  }

  // Keys of positions first .. first + count - 1 without their positions, to norm 1; the norms.
  std::vector<float> to_routing_space(float* keys, int count, int64_t first) const {
    const int dim = shape().head_dim;
    std::vector<float> norms;
    for (int t = 0; t < count; ++t) {
      float* key = keys + int64_t{t} * dim;
      undo_rope(key, first + t);
      norms.push_back(norm(key, dim));
      for (int d = 0; norms.back() > 0.0f && d < dim; ++d) key[d] /= norms.back();
    }
    return norms;
  }

  const Math& saap_;
  int clusters_, iterations_;
  Rope rope_;
  std::vector<double> frequencies_;  // [D / 2]
  std::optional<Network> network_;
};

void affine(const float* x, int m, const float* w, const float* b, int n, float* y) {
  for (int j = 0; j < n; ++j) {
    float sum = b != nullptr ? b[j] : 0.0f;
    for (int i = 0; i < m; ++i) sum += x[i] * w[int64_t{i} * n + j];
    y[j] = sum;
  }
}

void spread(const uint16_t* buckets, int64_t tokens, const float* values, float* out) {
  for (int64_t t = 0; t < tokens; ++t) out[t] = values[buckets[t]];
}

constexpr Math kRefMath = {affine, spread};

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& row_math, const Math& math) {
  return std::make_unique<Saap>(args, row_math, math);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return make(args, kRefRowMath, kRefMath);
}

}  // namespace sikv::saap
