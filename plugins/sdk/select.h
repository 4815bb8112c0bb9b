// From scores to a selection: the top-k rule that every selector shares.
//
// The `budget` best unpinned slots, ties at the cut to the lower slot, written in ascending order.
// Scores may be any float but NaN; -inf is the lowest and can be selected, -0 equals +0.
#ifndef SIKV_PLUGINS_SDK_SELECT_H_
#define SIKV_PLUGINS_SDK_SELECT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "plugins/sdk/error.h"
#include "plugins/sdk/options.h"
#include "plugins/sdk/view.h"

namespace sikv {

namespace sdk {

template <typename Score>
void select_top(std::span<const Score> scores, std::span<const int32_t> pinned, int64_t budget,
                SelectionRow& out) {
  std::vector<int32_t> slots;
  slots.reserve(scores.size());
  for_each_unpinned(static_cast<int>(scores.size()), pinned, [&](int32_t slot) {
    if (std::isnan(scores[slot])) {
      throw PluginBug("the score of slot " + std::to_string(slot) + " is NaN");
    }
    slots.push_back(slot);
  });
  if (budget < static_cast<int64_t>(slots.size())) {
    const auto cut = slots.begin() + std::max<int64_t>(budget, 0);
    std::nth_element(slots.begin(), cut, slots.end(), [&](int32_t a, int32_t b) {
      return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    });
    slots.erase(cut, slots.end());
    std::sort(slots.begin(), slots.end());
  }
  out.clear();
  for (int32_t slot : slots) out.push(slot);
}

}  // namespace sdk

// scores [n], by slot; `pinned` ascending. Scores of pinned slots are not read.
inline void select_top(std::span<const float> scores, std::span<const int32_t> pinned,
                       int64_t budget, SelectionRow& out) {
  sdk::select_top(scores, pinned, budget, out);
}
inline void select_top(std::span<const double> scores, std::span<const int32_t> pinned,
                       int64_t budget, SelectionRow& out) {
  sdk::select_top(scores, pinned, budget, out);
}

// Largest selection that `budget` allows on sequences of at most shape.max_tokens tokens: what a
// selector's plan answers.
inline int32_t selection_capacity(const Budget& budget, const sikv_shape& shape) {
  return static_cast<int32_t>(std::min<int64_t>(budget.tokens(shape.max_tokens), shape.max_tokens));
}

// out [D] = mean over q [G, D].
inline void group_mean(const float* q, int group, int head_dim, float* out) {
  for (int d = 0; d < head_dim; ++d) {
    float sum = 0.0f;
    for (int g = 0; g < group; ++g) sum += q[g * head_dim + d];
    out[d] = sum / static_cast<float>(group);
  }
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_SELECT_H_
