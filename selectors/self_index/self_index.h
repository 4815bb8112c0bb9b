// The self_index selector, private to this folder: its options and its two variants.
//
//   self_index_tables     query -> one lookup table per group of 4 channels
//   self_index_engine.h   what a variant computes for one row: scan, rerank, prompt attention
//   self_index_schedule   how rarely a head may be scanned (replay of the prompt's last queries)
//   self_index_selector   when a row is scanned, its candidate pool, state and counters
//   self_index_ref, _cpu  the engines; _simd, _packed the kernels of the second
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_H_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::self_index {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    choice_option("group", "mean", "mean|max_over_heads",
                  "score the mean of a KV head's query heads, or each one and take the maximum"),
    choice_option("tables", "exact", "exact|6bit", "lookup tables in fp32 or rounded to 0..63"),
    int_option("rerank", "1", 1, 64,
               "scan for this many budgets, keep the best by their decoded keys; 1 = no rerank"),
    choice_option("weighting", "none", "none|norm",
                  "norm: multiply a token's index score by its stored scale (rot_lm only)"),
    int_option("scan_every", "1", 1, 64, "decode steps that the candidates of one scan serve"),
    choice_option("schedule", "none", "none|auto",
                  "auto: choose 1, 2, 4 or 8 in place of scan_every for each layer and KV head"),
    float_option("tolerance", "0.01", 0, 1,
                 "schedule auto: dropped mass that a longer period may add"),
    float_option("refresh_cosine", "0", -1, 1,
                 "scan early when the query's cosine to the last scanned one is below; 0 = never"),
    int_option(
        "window", "48", 1, SIKV_PROMPT_QUERIES,
        "last prompt queries that schedule auto and refresh_cosine learn from; 128 are given"),
    bool_option("stagger", "false", "spread the scans of a period evenly over its steps"),
};

enum class Group { kMean, kMaxOverHeads };

struct Config {
  explicit Config(const Options& options);

  // Index scores are the sums of 6-bit tables themselves.
  bool integer_scores() const { return six_bit && !norm_weighting && group == Group::kMean; }
  // Candidates outlive the step they were scanned in.
  bool pooled() const { return scan_every > 1 || auto_schedule; }
  bool refreshes() const { return refresh_cosine != 0.0 && pooled(); }
  // Candidates of one scan at this budget.
  int64_t candidates(int64_t budget) const {
    return rerank * std::min<int64_t>(budget, std::numeric_limits<int32_t>::max());
  }

  Budget budget;
  Group group;
  bool six_bit;
  int rerank;
  bool norm_weighting;
  int scan_every;
  bool auto_schedule;
  double tolerance;
  double refresh_cosine;
  int window;
  bool stagger;
};

std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);
int32_t probe_cpu(const sikv_device* device, sikv_message* reason);

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_H_
