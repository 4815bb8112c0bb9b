// A pipeline at work on random prompts and steps, and what is then in its cache.
#ifndef SIKV_TESTS_SUPPORT_REPLAY_H_
#define SIKV_TESTS_SUPPORT_REPLAY_H_

#include <string>
#include <vector>

#include "framework/base/random.h"
#include "framework/config/pipeline_text.h"
#include "framework/pipeline/pipeline.h"
#include "tests/support/plugins.h"

namespace sikv::testing {

// One layer of one sequence, fp32: K, V [tokens, kHeads, kDim] and queries [tokens, kHeads * kGroup,
// kDim] of the prompt and the steps behind it.
struct Replay {
  static constexpr int kHeads = 2, kGroup = 2, kDim = 64;

  Replay(int prompt_tokens, int step_tokens, uint64_t seed)
      : prompt(prompt_tokens), steps(step_tokens) {
    Random random(seed);
    const auto fill = [&](std::vector<float>& to, int heads) {
      to.resize(static_cast<size_t>(prompt + steps) * static_cast<size_t>(heads * kDim));
      for (float& x : to) x = static_cast<float>(random.normal());
    };
    fill(k, kHeads), fill(v, kHeads), fill(q, kHeads * kGroup);
  }

  const float* key(int token, int head) const { return k.data() + (token * kHeads + head) * kDim; }
  const float* query(int token, int head) const {
    return q.data() + (token * kHeads * kGroup + head) * kDim;
  }

  struct Result {
    std::vector<float> out;                       // [steps, kHeads * kGroup, kDim]
    std::vector<std::vector<int32_t>> positions;  // of what each head has in pages at the end
  };

  // With the queries of the last `queries` prompt positions.
  Result run(const std::string& selector, int queries) const {
    const sikv_shape shape{sizeof(sikv_shape), 1, kHeads * kGroup, kHeads, kDim,
                           SIKV_FP32,          1, prompt + steps,  10000.0};
    Pipeline pipeline(parse_pipeline("fp16+fp16 > " + selector + " > gather_attention", registry()),
                      registry(), cpu(2), shape, steps);
    const int32_t first = 0, count = prompt;
    const auto rows = [&](const std::vector<float>& data) {
      return sikv_rows{data.data(), SIKV_FP32, prompt, &first, &count, kHeads * kDim, kDim};
    };
    pipeline.prefill(0, rows(k), rows(v), query(prompt - queries, 0), queries);
    Result result;
    result.out.resize(static_cast<size_t>(steps * kHeads * kGroup * kDim));
    std::vector<float> lse(kHeads * kGroup);
    for (int s = 0; s < steps; ++s) {
      const int token = prompt + s;
      pipeline.begin_step();
      pipeline.append(0, key(token, 0), v.data() + int64_t{token} * kHeads * kDim);
      pipeline.attend(0, query(token, 0), result.out.data() + int64_t{s} * kHeads * kGroup * kDim,
                      lse.data());
    }
    const sikv_cache_view view = pipeline.cache().host_view(0);
    for (int h = 0; h < kHeads; ++h) {
      auto& positions = result.positions.emplace_back();
      for (int slot = 0; slot < view.encoded_len[h]; ++slot) {
        const int64_t place = int64_t{h} * view.max_pages * SIKV_PAGE_TOKENS + slot;
        positions.push_back(view.positions == nullptr ? slot : view.positions[place]);
      }
    }
    return result;
  }

  int prompt, steps;
  std::vector<float> k, v, q;
};

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_REPLAY_H_
