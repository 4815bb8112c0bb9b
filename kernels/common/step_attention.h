// What the query of a decode step attends to in all that a row holds.
#ifndef SIKV_KERNELS_COMMON_STEP_ATTENTION_H_
#define SIKV_KERNELS_COMMON_STEP_ATTENTION_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels/common/window_scores.h"

namespace sikv {

// Mean over the group's heads of the softmax over encoded slots (as stored, pinned ones exact) and
// tail: [encoded_len + tail_len], slots first. Empty for an empty row.
inline std::vector<float> step_attention(const sikv_select_args& args, const CacheView& view,
                                         int row, const WindowMath& math) {
  const int dim = view.head_dim(), encoded = view.encoded_len(row), n = view.length(row);
  if (n == 0) return {};
  std::vector<float> keys(static_cast<size_t>(n) * static_cast<size_t>(dim));
  const auto key = [&](int i) { return keys.data() + int64_t{i} * dim; };
  std::vector<int32_t> slots(static_cast<size_t>(encoded));
  std::iota(slots.begin(), slots.end(), 0);
  view.key().decode(row, slots, key(0));
  const auto pinned = view.pinned_slots(row);
  for (int i = 0; i < static_cast<int>(pinned.size()); ++i) {
    view.load_pinned_k(row, i, key(pinned[static_cast<size_t>(i)]));
  }
  for (int i = encoded; i < n; ++i) view.load_tail_k(row, i - encoded, key(i));

  const QueryView queries(args.q, view, args.num_query_heads);
  std::vector<float> q(static_cast<size_t>(queries.group() * dim));
  queries.load_group(row, q.data());
  for (float& x : q) x *= args.scale;
  const int64_t stride = score_room(n);
  std::vector<float> logits(static_cast<size_t>(queries.group() * stride));
  std::vector<float> probability(static_cast<size_t>(stride));
  constexpr int kHeads = 16;  // at a time
  for (int g = 0; g < queries.group(); g += kHeads) {
    math.logits({keys.data(), SIKV_FP32, dim, dim}, q.data() + int64_t{g} * dim,
                std::min(kHeads, queries.group() - g), n, logits.data() + g * stride, stride);
  }
  math.mean_softmax(logits.data(), stride, queries.group(), n, probability.data());
  probability.resize(static_cast<size_t>(n));
  return probability;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_STEP_ATTENTION_H_
