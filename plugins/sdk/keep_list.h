// Slots of a row that stay in any case, those that compete for a budget, and the keep-list that comes
// of it: for evicting selectors, and for wrappers that choose anew what their base keeps.
#ifndef SIKV_PLUGINS_SDK_KEEP_LIST_H_
#define SIKV_PLUGINS_SDK_KEEP_LIST_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "plugins/sdk/base_selector.h"
#include "plugins/sdk/view.h"

namespace sikv {

inline constexpr float kAlwaysKept = std::numeric_limits<float>::infinity();

struct RankedRow {
  bool keeps_all = true;           // a base asks for no eviction
  int64_t budget = 0;              // of `competing`, how many a base keeps
  std::vector<int32_t> fixed;      // kept in any case: pinned or of infinite score; ascending
  std::vector<int32_t> competing;  // the others; ascending
  std::span<const float> scores;   // [encoded_len]
};

// By the scores of a layer [num_rows, max_encoded_len].
inline RankedRow ranked_row(const CacheView& view, int row, std::span<const float> scores) {
  const int64_t stride = view.raw().max_encoded_len;
  const int encoded = view.encoded_len(row);
  RankedRow ranked;
  ranked.scores = scores.subspan(static_cast<size_t>(row * stride), static_cast<size_t>(encoded));
  const auto pinned = view.pinned_slots(row);
  for (int32_t slot = 0; slot < encoded; ++slot) {
    const bool stays = ranked.scores[static_cast<size_t>(slot)] == kAlwaysKept ||
                       std::binary_search(pinned.begin(), pinned.end(), slot);
    (stays ? ranked.fixed : ranked.competing).push_back(slot);
  }
  return ranked;
}

// All rows of a layer: the base's keep-lists in `args`, its scores [num_rows, max_encoded_len].
inline std::vector<RankedRow> ranked_rows(const sikv_evict_args& args, const CacheView& view,
                                          std::span<const float> scores) {
  const int64_t stride = view.raw().max_encoded_len;
  std::vector<RankedRow> rows;
  for (int row = 0; row < view.num_rows(); ++row) {
    RankedRow& ranked = rows.emplace_back(ranked_row(view, row, scores));
    const int count = args.keep_counts[row];
    ranked.keeps_all = count == SIKV_SELECT_ALL;
    if (ranked.keeps_all) {
      ranked.budget = std::ssize(ranked.competing);
    } else {
      const int32_t* const kept = args.keep_slots + row * stride;
      ranked.budget = std::count_if(kept, kept + count, [&](int32_t slot) {
        return std::binary_search(ranked.competing.begin(), ranked.competing.end(), slot);
      });
    }
  }
  return rows;
}

// Scores of all slots of a layer from the base; what it leaves out counts as -1e38, the last choice.
inline std::vector<float> base_scores(const BaseSelector& base, const CacheView& view,
                                      Launch launch) {
  std::vector<float> scores(
      static_cast<size_t>(view.num_rows()) * static_cast<size_t>(view.raw().max_encoded_len),
      -1e38f);
  base.score({sizeof(sikv_score_args), 0, &view.raw(), scores.data()}, launch);
  return scores;
}

// The `count` best of `slots` by scores [slot], ties to the lower slot; ascending.
inline std::vector<int32_t> best_slots(std::vector<int32_t> slots, std::span<const float> scores,
                                       int64_t count) {
  if (count < std::ssize(slots)) {
    const auto cut = slots.begin() + std::max<int64_t>(count, 0);
    std::nth_element(slots.begin(), cut, slots.end(), [&](int32_t a, int32_t b) {
      const float x = scores[static_cast<size_t>(a)], y = scores[static_cast<size_t>(b)];
      return x > y || (x == y && a < b);
    });
    slots.erase(cut, slots.end());
    std::sort(slots.begin(), slots.end());
  }
  return slots;
}

// Makes `fixed` and `chosen` (both ascending) the keep-list of a row.
inline void write_keep_list(const sikv_evict_args& args, const CacheView& view, int row,
                            std::span<const int32_t> fixed, std::span<const int32_t> chosen) {
  const auto count = static_cast<int32_t>(fixed.size() + chosen.size());
  if (count == view.encoded_len(row)) {
    args.keep_counts[row] = SIKV_SELECT_ALL;
    return;
  }
  std::merge(fixed.begin(), fixed.end(), chosen.begin(), chosen.end(),
             args.keep_slots + int64_t{row} * view.raw().max_encoded_len);
  args.keep_counts[row] = count;
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_KEEP_LIST_H_
