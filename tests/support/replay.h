// A pipeline at work on random prompts and steps, and what is then in its cache.
#ifndef SIKV_TESTS_SUPPORT_REPLAY_H_
#define SIKV_TESTS_SUPPORT_REPLAY_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
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
    std::vector<uint64_t> state_bytes;            // of the selector, after each step; of a batch
                                                  // all sequences together
  };

  // With the queries of the last `queries` prompt positions.
  Result run(const std::string& selector, int queries) const {
    return run_batch({this, 1}, selector, queries).front();
  }

  // Sequences that are alike but for their prompts, in one batch. `queries` may be more than a prompt
  // has: of what is then in front of it nothing may be read.
  static std::vector<Result> run_batch(std::span<const Replay> batch, const std::string& selector,
                                       int queries) {
    const Replay& like = batch.front();
    const int layers = like.layers, steps = like.steps, heads = like.query_heads();
    int longest = 0;
    for (const Replay& replay : batch) longest = std::max(longest, replay.prompt);
    const auto size = static_cast<int32_t>(batch.size());
    const sikv_shape shape{sizeof(sikv_shape), layers, heads,           kHeads, kDim,
                           SIKV_FP32,          size,   longest + steps, 10000.0};
    Pipeline pipeline(parse_pipeline("fp16+fp16 > " + selector + " > gather_attention", registry()),
                      registry(), cpu(2), shape, steps);
    // [B, floats]
    const auto together = [&](auto&& address_of, int floats) {
      std::vector<float> all;
      for (const Replay& replay : batch) {
        const float* const from = address_of(replay);
        all.insert(all.end(), from, from + floats);
      }
      return all;
    };
    for (int l = 0; l < layers; ++l) prefill(pipeline, batch, l, queries);
    const int step_size = heads * kDim;
    std::vector<Result> results(batch.size());
    for (Result& result : results) {
      result.out.resize(static_cast<size_t>(steps * layers * step_size));
    }
    std::vector<float> out(batch.size() * static_cast<size_t>(step_size)),
        lse(batch.size() * static_cast<size_t>(heads));
    for (int s = 0; s < steps; ++s) {
      pipeline.begin_step();
      for (int l = 0; l < layers; ++l) {
        const auto at = [&](auto member) {
          return [=](const Replay& replay) { return (replay.*member)(replay.prompt + s, 0, l); };
        };
        pipeline.append(l, together(at(&Replay::key), kHeads * kDim).data(),
                        together(at(&Replay::value), kHeads * kDim).data());
        pipeline.attend(l, together(at(&Replay::query), step_size).data(), out.data(), lse.data());
        for (size_t b = 0; b < results.size(); ++b) {
          std::copy_n(out.begin() + static_cast<ptrdiff_t>(b) * step_size, step_size,
                      results[b].out.begin() + (int64_t{s} * layers + l) * step_size);
        }
      }
      for (Result& result : results) {
        result.state_bytes.push_back(pipeline.composition().selector().state_bytes());
      }
    }
    for (int l = 0; l < layers; ++l) {
      const sikv_cache_view view = pipeline.cache().host_view(l);
      for (int row = 0; row < size * kHeads; ++row) {
        auto& positions = results[static_cast<size_t>(row / kHeads)].positions.emplace_back();
        for (int slot = 0; slot < view.encoded_len[row]; ++slot) {
          const int64_t place = int64_t{row} * view.max_pages * SIKV_PAGE_TOKENS + slot;
          positions.push_back(view.positions == nullptr ? slot : view.positions[place]);
        }
      }
    }
    return results;
  }

  int prompt, steps, layers, hidden, group;
  std::vector<float> k, v, q, w_o;

 private:
  // One layer's prompts, one behind the other; queries [B, queries, Hq, D].
  static void prefill(Pipeline& pipeline, std::span<const Replay> batch, int layer, int queries) {
    std::vector<float> keys, values, q;
    std::vector<int32_t> first, count;
    for (const Replay& replay : batch) {
      const auto append = [](std::vector<float>& to, const float* from, int64_t floats) {
        to.insert(to.end(), from, from + floats);
      };
      first.push_back(static_cast<int32_t>(keys.size()) / (kHeads * kDim));
      count.push_back(replay.prompt);
      append(keys, replay.key(0, 0, layer), int64_t{replay.prompt} * kHeads * kDim);
      append(values, replay.value(0, 0, layer), int64_t{replay.prompt} * kHeads * kDim);
      const int own = std::min(queries, replay.prompt), step_size = replay.query_heads() * kDim;
      q.insert(q.end(), static_cast<size_t>((queries - own) * step_size),
               std::numeric_limits<float>::quiet_NaN());
      append(q, replay.query(replay.prompt - own, 0, layer), int64_t{own} * step_size);
    }
    const auto rows = [&](const std::vector<float>& data) {
      const auto tokens = static_cast<int32_t>(data.size()) / (kHeads * kDim);
      return sikv_rows{data.data(),  SIKV_FP32,     tokens, first.data(),
                       count.data(), kHeads * kDim, kDim};
    };
    const Replay& like = batch.front();
    pipeline.prefill(layer, rows(keys), rows(values), q.data(), queries,
                     like.hidden > 0 ? OutputProjection{like.projection(0, layer), like.hidden}
                                     : OutputProjection{});
  }
};

// [first, end)
inline std::vector<int32_t> token_range(int first, int end) {
  std::vector<int32_t> tokens(static_cast<size_t>(end - first));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// Prompts of different lengths in one batch: each sequence gets what it gets alone, to the bit, over
// two pages that are encoded while text is generated, at other steps of each. `all_queries`: those of
// the whole prompt; else of the last `window`.
inline void expect_batch_equals_each_alone(const std::string& selector, bool all_queries,
                                           int window = 1, int layers = 1, int hidden = 0) {
  SCOPED_TRACE(selector);
  std::vector<Replay> batch = {Replay(600, 450, 31, layers, hidden),
                               Replay(340, 450, 32, layers, hidden)};
  batch[1].w_o = batch[0].w_o;
  const auto results = Replay::run_batch(batch, selector, all_queries ? batch[0].prompt : window);
  for (size_t b = 0; b < batch.size(); ++b) {
    SCOPED_TRACE("sequence " + std::to_string(b));
    const auto alone = batch[b].run(selector, all_queries ? batch[b].prompt : window);
    EXPECT_EQ(results[b].positions, alone.positions);
    EXPECT_TRUE(results[b].out == alone.out);
    // Something was evicted, and two pages were encoded after the prompt's.
    const int encoded =
        (batch[b].prompt + batch[b].steps - 1) / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
    ASSERT_GE(encoded,
              batch[b].prompt / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS + 2 * SIKV_PAGE_TOKENS);
    for (const auto& positions : alone.positions) EXPECT_LT(std::ssize(positions), encoded);
  }
}

// Over thousands of steps a selector of that budget remembers only what its two heads hold: 8 bytes
// of a token, and room for a page on top of the one that fills.
inline void expect_state_of_held_tokens(const std::string& selector, int budget, int pinned,
                                        int queries) {
  SCOPED_TRACE(selector);
  const Replay replay(600, 3000, 33);
  const std::vector<uint64_t> bytes = replay.run(selector, queries).state_bytes;
  const auto tokens = static_cast<uint64_t>(budget + pinned + 2 * SIKV_PAGE_TOKENS);
  EXPECT_LE(*std::max_element(bytes.begin(), bytes.end()), Replay::kHeads * tokens * 8);
  EXPECT_GE(*std::min_element(bytes.begin(), bytes.end()),
            Replay::kHeads * static_cast<uint64_t>(budget) * 8);
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_REPLAY_H_
