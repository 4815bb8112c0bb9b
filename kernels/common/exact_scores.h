// What listed tokens of a row are worth to a query group by their keys as stored: the mean over the
// group's heads of each head's softmax over the listed slots, the pinned tokens and the tail.
//
// scalar_scorer() is the specification, in fp64; simd_scorer() is in exact_scores_simd.cc, which a
// plugin compiles itself where there is Highway.
#ifndef SIKV_KERNELS_COMMON_EXACT_SCORES_H_
#define SIKV_KERNELS_COMMON_EXACT_SCORES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

#include "plugins/sdk/view.h"

namespace sikv {

struct ScoreRequest {
  const CacheView& view;
  int row;
  int group;                       // G
  float scale;                     // of the logits
  const float* q;                  // [G, D]
  std::span<const int32_t> slots;  // unpinned, ascending
  int tail;                        // the first so many tail tokens take part in the softmax
};

// One worker's; not thread safe.
class RowScorer {
 public:
  virtual ~RowScorer() = default;
  // scores [slots.size()]
  virtual void score(const ScoreRequest& request, std::vector<float>& scores) = 0;
  // Indices of the `count` highest of more than `count` scores, ascending, ties to the lower.
  virtual void best(std::span<const float> scores, int64_t count,
                    std::vector<int32_t>& indices) = 0;
};

std::unique_ptr<RowScorer> simd_scorer();
bool simd_scorer_runs();

// `best` in falling order of score, ties to the lower: orders `indices` in place.
inline void rank(std::span<const float> scores, std::vector<int32_t>& indices) {
  std::sort(indices.begin(), indices.end(), [&](int32_t a, int32_t b) {
    const float x = scores[static_cast<size_t>(a)], y = scores[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  });
}

class ScalarScorer final : public RowScorer {
 public:
  void score(const ScoreRequest& request, std::vector<float>& scores) override {
    const CacheView& view = request.view;
    const auto dim = static_cast<size_t>(view.head_dim());
    const size_t listed = request.slots.size(), pinned = view.pinned_slots(request.row).size();
    const size_t tokens = listed + pinned + static_cast<size_t>(request.tail);
    keys_.resize(tokens * dim);
    view.key().decode(request.row, request.slots, keys_.data());
    float* exact = keys_.data() + listed * dim;
    for (size_t i = 0; i < pinned; ++i, exact += dim) {
      view.load_pinned_k(request.row, static_cast<int>(i), exact);
    }
    for (int i = 0; i < request.tail; ++i, exact += dim) view.load_tail_k(request.row, i, exact);

    scores.assign(listed, 0.0f);
    mean_.assign(listed, 0.0);
    p_.resize(tokens);
    for (int g = 0; g < request.group; ++g) {
      const float* q = request.q + static_cast<size_t>(g) * dim;
      double highest = -std::numeric_limits<double>::infinity(), sum = 0.0;
      for (size_t t = 0; t < tokens; ++t) {
        double dot = 0.0;
        for (size_t d = 0; d < dim; ++d) dot += double{q[d]} * keys_[t * dim + d];
        p_[t] = request.scale * dot;
        highest = std::max(highest, p_[t]);
      }
      for (double& p : p_) sum += p = std::exp(p - highest);
      for (size_t t = 0; t < listed; ++t) mean_[t] += p_[t] / sum / request.group;
    }
    for (size_t t = 0; t < listed; ++t) scores[t] = static_cast<float>(mean_[t]);
  }

  void best(std::span<const float> scores, int64_t count, std::vector<int32_t>& indices) override {
    indices.resize(scores.size());
    std::iota(indices.begin(), indices.end(), 0);
    rank(scores, indices);
    indices.resize(static_cast<size_t>(count));
    std::sort(indices.begin(), indices.end());
  }

 private:
  std::vector<float> keys_;
  std::vector<double> p_, mean_;
};

inline std::unique_ptr<RowScorer> scalar_scorer() { return std::make_unique<ScalarScorer>(); }

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_EXACT_SCORES_H_
