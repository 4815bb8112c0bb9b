// What a selector should have taken, from a score of the test's own.
#ifndef SIKV_TESTS_SUPPORT_RANKING_H_
#define SIKV_TESTS_SUPPORT_RANKING_H_

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "plugins/sdk/view.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {

// The `budget` best unpinned slots by score(slot), ties to the lower, ascending.
template <typename Score>
Slots best_slots(const FilledCache& filled, int row, size_t budget, Score&& score) {
  std::vector<std::pair<double, int32_t>> order;
  for (int32_t slot : candidates(filled.cache, row)) order.emplace_back(-score(slot), slot);
  std::sort(order.begin(), order.end());
  order.resize(std::min(budget, order.size()));
  Slots slots;
  for (const auto& [negated, slot] : order) slots.push_back(slot);
  std::sort(slots.begin(), slots.end());
  return slots;
}

// The exact key of a row's slot.
inline std::vector<float> key_of(const FilledCache& filled, int row, int slot) {
  const int heads = filled.cache.view().num_kv_heads;
  return filled.k.row(row / heads, slot, row % heads);
}

// [D] of queries [B, Hq, D]: head g of the group that a row answers.
inline std::vector<float> query_of(const FilledCache& filled, const std::vector<uint8_t>& q,
                                   int row, int group = 1, int g = 0) {
  const sikv_cache_view& view = filled.cache.view();
  std::vector<float> head(static_cast<size_t>(view.head_dim));
  load_floats(q.data(), view.dtype, (int64_t{row} * group + g) * view.head_dim, view.head_dim,
              head.data());
  return head;
}

inline double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * b[i];
  return sum;
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_RANKING_H_
