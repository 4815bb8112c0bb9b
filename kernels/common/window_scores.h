// What the last queries of a prompt attended to: the score that eviction methods rank tokens by
// (SnapKV, arXiv 2404.14469).
//
//   score[t] = pool(mean over the window's queries i and the group's heads of softmax(q_i.k)[t])
//
// A query sees the tokens up to its own position. Keys are the prompt's exact ones.
#ifndef SIKV_KERNELS_COMMON_WINDOW_SCORES_H_
#define SIKV_KERNELS_COMMON_WINDOW_SCORES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/common/row_math.h"
#include "plugins/sdk/plugin.h"
#include "plugins/sdk/prompt_queries.h"

namespace sikv {

// The exact keys of one row, from position 0.
struct PromptKeys {
  const void* first;
  int32_t dtype;
  int64_t stride;  // elements from one to the next
  int head_dim;
};

// In scalar code, which is the specification, and in SIMD (window_scores_simd.cc).
struct WindowMath {
  // logits [heads, stride] of q [heads <= 16, D] with the first n keys; stride = score_room(n).
  void (*logits)(const PromptKeys& keys, const float* q, int heads, int64_t n, float* logits,
                 int64_t stride);
  // As RowMath::mean_softmax.
  void (*mean_softmax)(float* logits, int64_t stride, int group, int64_t n, float* out);
};

namespace window_ref {

inline void logits(const PromptKeys& keys, const float* q, int heads, int64_t n, float* logits,
                   int64_t stride) {
  const int dim = keys.head_dim;
  std::vector<float> key(static_cast<size_t>(dim));
  for (int64_t t = 0; t < n; ++t) {
    load_floats(keys.first, keys.dtype, t * keys.stride, dim, key.data());
    float dots[16] = {};  // side by side: one sum waits for itself
    for (int d = 0; d < dim; ++d) {
      for (int h = 0; h < heads; ++h) dots[h] += q[h * dim + d] * key[static_cast<size_t>(d)];
    }
    for (int h = 0; h < heads; ++h) logits[h * stride + t] = dots[h];
  }
}

}  // namespace window_ref

inline constexpr WindowMath kRefWindowMath = {window_ref::logits, row_math_ref::mean_softmax};

// Null where the processor has no vectors that Highway knows.
const WindowMath* simd_window_math();

// For probe: 10 where simd_window_math() has an answer.
int32_t probe_window_math(const sikv_device* device, sikv_message* reason);

enum class Pooling { kMean, kMax };

// Each score becomes the mean (of `kernel` terms, those beyond the ends 0) or the maximum of the
// `kernel` scores around it; kernel is odd.
inline std::vector<float> pooled(const std::vector<float>& scores, int kernel, Pooling pooling) {
  const int64_t n = std::ssize(scores), reach = kernel / 2;
  std::vector<float> out(scores.size());
  for (int64_t i = 0; i < n; ++i) {
    const auto begin = scores.begin() + std::max<int64_t>(i - reach, 0);
    const auto end = scores.begin() + std::min(i + reach + 1, n);
    float& pool = out[static_cast<size_t>(i)];
    if (pooling == Pooling::kMax) {
      pool = *std::max_element(begin, end);
    } else {
      for (auto score = begin; score < end; ++score) pool += *score;
      pool /= static_cast<float>(kernel);
    }
  }
  return out;
}

// visit(probability, seen) for each of the last `queries` prompt queries and each `pooled` heads of
// the group (all of it, or 1 at a time): the mean of their softmax over the first `seen` tokens.
template <typename Visit>
void for_each_window_softmax(const sikv_observe_args& args, const CacheView& view, int row,
                             int group, int queries, int pooled, const WindowMath& math,
                             Visit&& visit) {
  const int heads = view.num_kv_heads(), dim = view.head_dim();
  const int b = row / heads, h = row % heads;
  const int64_t prompt = args.prompt_len[b];
  const PromptQueries window(args, group * heads);
  const RowsView rows(args.keys);
  const PromptKeys keys{rows.address(b, 0, h), rows.dtype(), args.keys.token_stride, dim};
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  // As many queries at a time as make up 16 heads.
  constexpr int kHeads = 16;
  const int batch = std::max(kHeads / group, 1);
  const int64_t stride = score_room(prompt);
  std::vector<float> q(static_cast<size_t>(std::max(batch * group, kHeads) * dim));
  std::vector<float> logits(static_cast<size_t>(batch * group * stride));
  std::vector<float> probability(static_cast<size_t>(stride));
  for (int first = 0; first < queries; first += batch) {
    const int here = std::min(batch, queries - first);
    for (int i = 0; i < here; ++i) {
      window.load_group(row, queries - first - i, q.data() + int64_t{i} * group * dim);
    }
    for (int i = 0; i < here * group * dim; ++i) q[static_cast<size_t>(i)] *= scale;
    const int64_t most_seen = prompt - queries + first + here;
    for (int done = 0; done < here * group; done += kHeads) {
      math.logits(keys, q.data() + int64_t{done} * dim, std::min(kHeads, here * group - done),
                  most_seen, logits.data() + done * stride, stride);
    }
    for (int i = 0; i < here * group; i += pooled) {
      const int64_t seen = prompt - queries + first + i / group + 1;
      math.mean_softmax(logits.data() + i * stride, stride, pooled, seen, probability.data());
      visit(std::span<const float>(probability.data(), static_cast<size_t>(seen)));
    }
  }
}

// Of a row: the last `window` queries, or as many as there are.
inline int window_queries(const sikv_observe_args& args, const CacheView& view, int row,
                          int window) {
  const int64_t prompt = args.prompt_len[row / view.num_kv_heads()];
  return static_cast<int>(std::min<int64_t>({int64_t{window}, int64_t{args.num_queries}, prompt}));
}

// scores [prompt_len], not pooled, of the last `window` queries (or as many as there are) of a row.
inline std::vector<float> window_attention(const sikv_observe_args& args, const CacheView& view,
                                           int row, int group, int window, const WindowMath& math) {
  const int queries = window_queries(args, view, row, window);
  std::vector<float> scores(static_cast<size_t>(args.prompt_len[row / view.num_kv_heads()]), 0.0f);
  for_each_window_softmax(args, view, row, group, queries, group, math,
                          [&](std::span<const float> probability) {
                            for (size_t t = 0; t < probability.size(); ++t) {
                              scores[t] += probability[t] / static_cast<float>(queries);
                            }
                          });
  return scores;
}

// Options of methods that rank by it.
inline constexpr sikv_option_spec kWindowOption =
    int_option("window", "32", 1, SIKV_PROMPT_QUERIES,
               "last prompt queries that score, and tokens always kept; 128 queries are given");
inline constexpr sikv_option_spec kKernelOption =
    int_option("kernel_size", "7", 1, 63, "scores that are pooled around each token; odd");
inline constexpr sikv_option_spec kPoolingOption =
    choice_option("pooling", "max", "mean|max", "how they are pooled");

// The scores of a row as these options say.
class WindowRanking {
 public:
  WindowRanking(const Options& options, const WindowMath& math)
      : kernel_(static_cast<int>(options.integer("kernel_size"))),
        pooling_(options.choice("pooling") == "max" ? Pooling::kMax : Pooling::kMean),
        math_(math) {
    if (kernel_ % 2 == 0) {
      throw Refused("kernel_size is " + std::to_string(kernel_) +
                    ", which has no middle: give an odd number");
    }
  }

  // [prompt_len]; the window's own tokens, which are kept, have none and are in no pool.
  std::vector<float> scores(const sikv_observe_args& args, const CacheView& view, int row,
                            int group, int window) const {
    return pool(window_attention(args, view, row, group, window, math_), window);
  }
  std::vector<float> pool(std::vector<float> scores, int window) const {
    const size_t prompt = scores.size();
    scores.resize(prompt - std::min(prompt, static_cast<size_t>(window)));
    scores = pooled(scores, kernel_, pooling_);
    scores.resize(prompt, 0.0f);
    return scores;
  }
  const WindowMath& math() const { return math_; }

 private:
  int kernel_;
  Pooling pooling_;
  const WindowMath& math_;
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_WINDOW_SCORES_H_
