// Skeleton of selectors that go on scoring while text is generated: after the prompt, and whenever
// generated tokens have filled a page, a row goes back to its budget. What is left is attended to as
// a whole.
//
//   row     | in pages: budget, best scores and the newest `recent` | tail |
//   page    | in pages: budget | 256 new ones |                            -> back to the budget
//
// Newest tokens count towards the budget as far as they lie in pages; pinned ones and the tail do
// not.
#ifndef SIKV_KERNELS_COMMON_RUNNING_EVICTION_H_
#define SIKV_KERNELS_COMMON_RUNNING_EVICTION_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/common/head_mean.h"
#include "kernels/common/step_attention.h"
#include "plugins/sdk/keep_list.h"
#include "plugins/sdk/plugin.h"
#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/state.h"

namespace sikv {

class RunningEviction : public ScoringSelector {
 public:
  // `heads`: whether KV heads rank each for itself or all by their mean.
  enum class Heads { kEach, kMean };
  RunningEviction(const CreateArgs& args, Budget budget, const WindowMath& math, Heads heads)
      : group_(args.group()),
        budget_(budget),
        math_(math),
        heads_(heads),
        host_(args.host),
        rows_(args.shape) {}

  Plan plan() override { return {}; }
  void begin_sequence(int sequence) override { rows_.reset(sequence); }
  void begin_step(int64_t step) override { step_ = step; }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t) {
      const int row = static_cast<int>(i);
      const int64_t prompt = args.prompt_len[row / view.num_kv_heads()];
      rows_.at(view.layer(), row) = {prompt, prompt, budget_.tokens(prompt), true,
                                     score_prompt(args, view, row)};
    });
    if (heads_ == Heads::kMean) share(view);
  }

  void observe_page(const sikv_observe_page_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      rows_.at(view.layer(), row).due = args.keys.count[row / view.num_kv_heads()] > 0;
    }
  }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    std::atomic<bool> scored = false;
    parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t) {
      const int row = static_cast<int>(i);
      SelectionRow(args.selection, row).select_all();
      Row& state = rows_.at(view.layer(), row);
      if (state.scores.empty()) return cost_.add(0);
      state.length = state.prompt + step_ + 1;
      const auto length = static_cast<size_t>(state.length);
      // A page at a time, not doubled: it counts as memory of the cache.
      if (state.scores.capacity() < length) state.scores.reserve(length + kPageTokens);
      state.scores.resize(length, 0.0f);
      const int64_t bytes = score_step(args, view, row, state.scores);
      cost_.add(bytes);
      if (bytes > 0) scored = true;
    });
    if (heads_ == Heads::kMean && scored) share(view);
  }

  void score(const sikv_score_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      const Row& state = rows_.at(view.layer(), row);
      for (int slot = 0; slot < view.encoded_len(row); ++slot) {
        const int64_t position = view.position(row, slot);
        const bool scored =
            position < std::min(state.length - recent(state.budget), std::ssize(state.scores));
        args.scores[int64_t{row} * view.raw().max_encoded_len + slot] =
            scored ? state.scores[static_cast<size_t>(position)] : kAlwaysKept;
      }
    }
  }

  // Of the sequences that have just got a prompt or a page.
  void evict(const sikv_evict_args& args, const CacheView& view, Launch launch) override {
    std::vector<float> scores(static_cast<size_t>(view.num_rows()) *
                              static_cast<size_t>(view.raw().max_encoded_len));
    score({sizeof(sikv_score_args), 0, &view.raw(), scores.data()}, view, launch);
    for (int row = 0; row < view.num_rows(); ++row) {
      args.keep_counts[row] = SIKV_SELECT_ALL;
      Row& state = rows_.at(view.layer(), row);
      if (!std::exchange(state.due, false)) continue;
      const RankedRow ranked = ranked_row(view, row, scores);
      const int64_t newest = std::ssize(ranked.fixed) - std::ssize(view.pinned_slots(row));
      const int64_t others = state.budget - newest;
      write_keep_list(args, view, row, ranked.fixed,
                      best_slots(ranked.competing, ranked.scores, std::max<int64_t>(others, 0)));
    }
  }

  void counters(const std::function<void(std::string_view, double)>& push) const override {
    cost_.push(push);
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = 0;
    for (const Row& row : rows_) bytes += row.scores.capacity() * sizeof(float);
    return bytes;
  }

 protected:
  int group() const { return group_; }
  const WindowMath& math() const { return math_; }
  // Of a row with that budget: the newest tokens that are kept whatever their scores.
  virtual int64_t recent(int64_t budget) const = 0;
  // [prompt_len]
  virtual std::vector<float> score_prompt(const sikv_observe_args& args, const CacheView& view,
                                          int row) const = 0;
  // Updates the scores, by position, of a row with the step's queries. Bytes read to do so.
  virtual int64_t score_step(const sikv_select_args& args, const CacheView& view, int row,
                             std::vector<float>& scores) const = 0;
  // visit(position, probability) for all that a row holds, the newest position being the last of
  // `length`. Bytes read.
  template <typename Visit>
  int64_t attend(const sikv_select_args& args, const CacheView& view, int row, size_t length,
                 Visit&& visit) const {
    const std::vector<float> attention = step_attention(args, view, row, math_);
    const auto encoded = static_cast<size_t>(view.encoded_len(row));
    for (size_t i = 0; i < attention.size(); ++i) {
      const size_t position = i < encoded
                                  ? static_cast<size_t>(view.position(row, static_cast<int>(i)))
                                  : length - attention.size() + i;
      visit(position, attention[i]);
    }
    return row_key_bytes(view, row, view.encoded_len(row) - std::ssize(view.pinned_slots(row)));
  }

 private:
  struct Row {
    int64_t prompt = 0, length = 0;  // tokens, of the latter with those generated
    int64_t budget = 0;
    bool due = false;           // got a prompt or a page since it was last cut
    std::vector<float> scores;  // by position, [length] after a step; empty without a prompt
  };

  void share(const CacheView& view) {
    const int heads = view.num_kv_heads();
    for (int first = 0; first < view.num_rows(); first += heads) {
      average_heads(
          first, heads, [&](int row) -> auto& { return rows_.at(view.layer(), row).scores; });
    }
  }

  int group_;
  Budget budget_;
  const WindowMath& math_;
  Heads heads_;
  const sikv_host& host_;
  int64_t step_ = 0;
  RowState<Row> rows_;
  ScanCost cost_;
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_RUNNING_EVICTION_H_
