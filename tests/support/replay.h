// A pipeline at work on random prompts and steps, and what is then in its cache.
#ifndef SIKV_TESTS_SUPPORT_REPLAY_H_
#define SIKV_TESTS_SUPPORT_REPLAY_H_

#include <cmath>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "framework/base/random.h"
#include "framework/config/pipeline_text.h"
#include "framework/pipeline/pipeline.h"
#include "tests/support/plugins.h"

namespace sikv::testing {

// One sequence, fp32: per layer K, V [tokens, kHeads, kDim] and queries [tokens, kHeads * group,
// kDim] of the prompt and the steps behind it; with `hidden` an output projection, too.
struct Replay {
  static constexpr int kHeads = 2, kDim = 64;

  Replay(int prompt_tokens, int step_tokens, uint64_t seed, int num_layers = 1, int hidden_size = 0,
         int group_size = 2)
      : prompt(prompt_tokens),
        steps(step_tokens),
        layers(num_layers),
        hidden(hidden_size),
        group(group_size) {
    Random random(seed);
    const auto fill = [&](std::vector<float>& to, int64_t count) {
      to.resize(static_cast<size_t>(count));
      for (float& x : to) x = static_cast<float>(random.normal());
    };
    const int64_t tokens = int64_t{layers} * (prompt + steps);
    fill(k, tokens * kHeads * kDim), fill(v, tokens * kHeads * kDim);
    fill(q, tokens * query_heads() * kDim);
    fill(w_o, int64_t{layers} * query_heads() * kDim * hidden);
  }

  int query_heads() const { return kHeads * group; }

  int64_t token_at(int layer, int token) const { return int64_t{layer} * (prompt + steps) + token; }
  const float* key(int token, int head, int layer = 0) const {
    return k.data() + (token_at(layer, token) * kHeads + head) * kDim;
  }
  const float* value(int token, int head, int layer = 0) const {
    return v.data() + (token_at(layer, token) * kHeads + head) * kDim;
  }
  const float* query(int token, int head, int layer = 0) const {
    return q.data() + (token_at(layer, token) * query_heads() + head) * kDim;
  }
  // [kDim, hidden] of a query head.
  const float* projection(int head, int layer) const {
    return w_o.data() + (int64_t{layer} * query_heads() + head) * kDim * hidden;
  }

  // What a query [kDim] of a KV head attends to of the tokens `seen`, in fp64 and by no plugin's
  // code: what brute-force references of evicting selectors are made of.
  template <typename Float>
  std::vector<double> attention(const Float* x, int kv_head, std::span<const int32_t> seen,
                                int layer = 0) const {
    std::vector<double> e;
    double total = 0.0;
    for (const int32_t t : seen) {
      const float* k = key(t, kv_head, layer);
      double dot = 0.0;
      for (int d = 0; d < kDim; ++d) dot += double{x[d]} * k[d];
      e.push_back(std::exp(dot / std::sqrt(kDim)));
      total += e.back();
    }
    for (double& probability : e) probability /= total;
    return e;
  }

  struct Result {
    std::vector<float> out;                       // [steps, layers, query_heads(), kDim]
    std::vector<std::vector<int32_t>> positions;  // of what layer 0's heads have in pages at the
                                                  // end, then of layer 1's ...
  };

  // With the queries of the last `queries` prompt positions.
  Result run(const std::string& selector, int queries) const {
    const sikv_shape shape{sizeof(sikv_shape), layers, query_heads(),  kHeads, kDim,
                           SIKV_FP32,          1,      prompt + steps, 10000.0};
    Pipeline pipeline(parse_pipeline("fp16+fp16 > " + selector + " > gather_attention", registry()),
                      registry(), cpu(2), shape, steps);
    const int32_t first = 0, count = prompt;
    const auto rows = [&](const float* data) {
      return sikv_rows{data, SIKV_FP32, prompt, &first, &count, kHeads * kDim, kDim};
    };
    for (int l = 0; l < layers; ++l) {
      pipeline.prefill(
          l, rows(key(0, 0, l)), rows(value(0, 0, l)), query(prompt - queries, 0, l), queries,
          hidden > 0 ? OutputProjection{projection(0, l), hidden} : OutputProjection{});
    }
    const int step_size = query_heads() * kDim;
    Result result;
    result.out.resize(static_cast<size_t>(steps * layers * step_size));
    std::vector<float> lse(static_cast<size_t>(query_heads()));
    for (int s = 0; s < steps; ++s) {
      const int token = prompt + s;
      pipeline.begin_step();
      for (int l = 0; l < layers; ++l) {
        pipeline.append(l, key(token, 0, l), value(token, 0, l));
        pipeline.attend(l, query(token, 0, l),
                        result.out.data() + (int64_t{s} * layers + l) * step_size, lse.data());
      }
    }
    for (int l = 0; l < layers; ++l) {
      const sikv_cache_view view = pipeline.cache().host_view(l);
      for (int h = 0; h < kHeads; ++h) {
        auto& positions = result.positions.emplace_back();
        for (int slot = 0; slot < view.encoded_len[h]; ++slot) {
          const int64_t place = int64_t{h} * view.max_pages * SIKV_PAGE_TOKENS + slot;
          positions.push_back(view.positions == nullptr ? slot : view.positions[place]);
        }
      }
    }
    return result;
  }

  int prompt, steps, layers, hidden, group;
  std::vector<float> k, v, q, w_o;
};

// [first, end)
inline std::vector<int32_t> token_range(int first, int end) {
  std::vector<int32_t> tokens(static_cast<size_t>(end - first));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_REPLAY_H_
