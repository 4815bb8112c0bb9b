// What an evicting selector keeps of a filled cache, after a prompt.
#ifndef SIKV_TESTS_SUPPORT_EVICTIONS_H_
#define SIKV_TESTS_SUPPORT_EVICTIONS_H_

#include "tests/support/scored_selector.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {

// Keep-lists of all rows without pinned slots; of a row that is kept, all of them.
inline std::vector<Slots> kept_after_prompt(const Variant& variant, const Choices& choices,
                                            const FilledCache& filled, int group) {
  SelectorSession session(variant, choices, filled, group);
  session.observe_everything();
  std::vector<Slots> lists = evictions(session.selector(), filled.cache);
  for (int row = 0; row < filled.cache.num_rows(); ++row) {
    Slots& list = lists[static_cast<size_t>(row)];
    const Slots open = candidates(filled.cache, row);
    if (list == Slots{SIKV_SELECT_ALL}) {
      list = open;
      continue;
    }
    Slots unpinned;
    std::set_intersection(list.begin(), list.end(), open.begin(), open.end(),
                          std::back_inserter(unpinned));
    list = unpinned;
  }
  return lists;
}

// A selector of one budget for every row keeps exactly that many, pinned tokens on top.
inline void expect_exact_budgets(const Variant& variant) {
  constexpr int kGroup = 3;
  const CacheSpec spec{
      .num_kv_heads = 2, .head_dim = 64, .encoded = {512, 256}, .tail = {2, 90}, .pinned = 9};
  const sikv_shape shape = tight_shape(spec, kGroup);
  const FilledCache filled(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                           make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
  for (const int budget : {0, 1, 100, 247, 600}) {
    const auto kept =
        kept_after_prompt(variant, {{"budget", std::to_string(budget)}}, filled, kGroup);
    for (int row = 0; row < filled.cache.num_rows(); ++row) {
      EXPECT_EQ(kept[static_cast<size_t>(row)].size(),
                std::min(candidates(filled.cache, row).size(), static_cast<size_t>(budget)));
    }
  }
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_EVICTIONS_H_
