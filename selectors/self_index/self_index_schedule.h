// schedule: auto. How many steps the candidates of one scan may serve, judged on the prompt's own
// last queries.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SCHEDULE_H_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SCHEDULE_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "plugins/sdk/plugin.h"
#include "selectors/self_index/self_index_engine.h"

namespace sikv::self_index {

inline constexpr std::array<int, 4> kPeriods = {1, 2, 4, 8};

// The last `count` queries of one sequence's prompt, for one KV head.
class PromptQueries {
 public:
  // At most `window` of those observe() was given.
  PromptQueries(const sikv_observe_args& args, const CacheView& view, int num_query_heads, int row,
                int window);

  int count() const { return count_; }
  int64_t prompt_len() const { return prompt_len_; }
  int group() const { return group_; }
  // Position of query i in the prompt.
  int64_t position(int i) const { return prompt_len_ - count_ + i; }
  void load(int i, float* out) const;  // [G, D]

 private:
  const void* queries_;
  int32_t dtype_;
  int64_t prompt_len_, first_, stride_;
  int head_dim_, group_, count_;
};

// Scratch of one replay.
struct ReplayScratch {
  ReplayScratch(Arena& arena, const Limits& limits);

  float* heads;                                      // [G, D]
  float* mean;                                       // [D]
  float* probability;                                // [tokens]
  int32_t* order;                                    // [candidates]
  std::array<int32_t*, kPeriods.size()> candidates;  // [candidates] each
};

// mean_dropped[j] = dropped mass of the replay that scans every kPeriods[j] queries: query i sees
// the prompt up to itself; what the last scan found, of which the `budget` most probable by exact
// keys are kept, pinned tokens, and everything from min(encoded, first replayed position) on.
std::array<double, kPeriods.size()> replay(const Engine& engine, const Config& config,
                                           const PromptQueries& queries, const RowsView& keys,
                                           const CacheView& view, int row, IndexTables& tables,
                                           const ReplayScratch& scratch, std::byte* engine_scratch);

// The longest period whose dropped mass exceeds that of scanning every step by at most `tolerance`.
int longest_period(const std::array<double, kPeriods.size()>& mean_dropped, double tolerance);

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SCHEDULE_H_
