// Skeleton of selectors that go on scoring while text is generated: after the prompt, and whenever
// generated tokens have filled a page, a row goes back to its budget. What is left is attended to as
// a whole.
//
//   row     | in pages: budget, best scores and the newest `recent` | tail |
//   page    | in pages: budget | 256 new ones |                            -> back to the budget
//
// Newest tokens count towards the budget as far as they lie in pages; pinned ones and the tail do
// not. What is remembered is of tokens that are held: 8 bytes each, and room for a page.
#ifndef SIKV_KERNELS_COMMON_RUNNING_EVICTION_H_
#define SIKV_KERNELS_COMMON_RUNNING_EVICTION_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

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
      std::vector<int32_t> positions(static_cast<size_t>(prompt));
      std::iota(positions.begin(), positions.end(), 0);
      rows_.at(view.layer(), row) = {prompt,
                                     prompt,
                                     budget_.tokens(prompt),
                                     true,
                                     std::move(positions),
                                     score_prompt(args, view, row)};
    });
    for (int b = 0; heads_ == Heads::kMean && b < view.num_sequences(); ++b) share(view, b);
  }

  void observe_page(const sikv_observe_page_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      rows_.at(view.layer(), row).due = args.keys.count[row / view.num_kv_heads()] > 0;
    }
  }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    // Not of bool, whose elements share bytes: rows run side by side.
    std::vector<uint8_t> scored(static_cast<size_t>(view.num_rows()));
    parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t) {
      const int row = static_cast<int>(i);
      SelectionRow(args.selection, row).select_all();
      Row& state = rows_.at(view.layer(), row);
      if (state.prompt == 0) return cost_.add(0);
      state.length = state.prompt + step_ + 1;
      follow(view, row, state);
      const int64_t bytes = score_step(args, view, row, state.scores);
      cost_.add(bytes);
      scored[static_cast<size_t>(i)] = bytes > 0;
    });
    const auto heads = static_cast<size_t>(view.num_kv_heads());
    for (size_t row = 0; heads_ == Heads::kMean && row < scored.size(); row += heads) {
      if (scored[row]) share(view, static_cast<int>(row / heads));
    }
  }

  void score(const sikv_score_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      const Row& state = rows_.at(view.layer(), row);
      size_t at = 0;
      for (int slot = 0; slot < view.encoded_len(row); ++slot) {
        const int64_t position = view.position(row, slot);
        at = state.first_from(position, at);
        const bool scored =
            position < state.length - recent(state.budget) && at < state.positions.size();
        args.scores[int64_t{row} * view.raw().max_encoded_len + slot] =
            scored ? state.scores[at] : kAlwaysKept;
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
    for (const Row& row : rows_) {
      bytes += row.positions.capacity() * sizeof(int32_t) + row.scores.capacity() * sizeof(float);
    }
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
  // Updates the scores of what a row holds, slots first, with the step's queries. Bytes read to do
  // so.
  virtual int64_t score_step(const sikv_select_args& args, const CacheView& view, int row,
                             std::vector<float>& scores) const = 0;
  // visit(i, probability) for all that a row holds, slots first. Bytes read.
  template <typename Visit>
  int64_t attend(const sikv_select_args& args, const CacheView& view, int row,
                 Visit&& visit) const {
    const std::vector<float> attention = step_attention(args, view, row, math_);
    for (size_t i = 0; i < attention.size(); ++i) visit(i, attention[i]);
    return row_key_bytes(view, row, view.encoded_len(row) - std::ssize(view.pinned_slots(row)));
  }

 private:
  struct Row {
    int64_t prompt = 0, length = 0;  // tokens, of the latter with those generated
    int64_t budget = 0;
    bool due = false;  // got a prompt or a page since it was last cut
    // Of the tokens held at the last step, ascending; empty without a prompt.
    std::vector<int32_t> positions;
    std::vector<float> scores;

    void add(int32_t position, float score) {
      if (positions.size() == positions.capacity()) make_room(positions.size() + 1);
      positions.push_back(position);
      scores.push_back(score);
    }
    // A page more than `tokens`, not twice as many: it counts as memory of the cache.
    void make_room(size_t tokens) {
      positions.reserve(tokens + kPageTokens);
      scores.reserve(tokens + kPageTokens);
    }
    // The first of `positions`, from the `at`-th on, that is not below `position`.
    size_t first_from(int64_t position, size_t at) const {
      while (at < positions.size() && positions[at] < position) ++at;
      return at;
    }
  };

  // Forgets what was evicted since the last step and takes in what came, with scores of 0.
  static void follow(const CacheView& view, int row, Row& state) {
    const int held = view.length(row), encoded = view.encoded_len(row);
    const auto position = [&](int i) {
      return i < encoded ? view.position(row, i) : static_cast<int32_t>(state.length - held + i);
    };
    const auto known = static_cast<int>(state.positions.size());
    // Both ascend: where the last one known is held at its own place, all of them are.
    if (known > held || (known > 0 && position(known - 1) != state.positions.back())) {
      // Once per page; into new vectors, so that memory goes, too.
      Row left;
      left.make_room(static_cast<size_t>(held));
      size_t at = 0;
      for (int i = 0; i < held && position(i) <= state.positions.back(); ++i) {
        at = state.first_from(position(i), at);
        left.add(position(i), state.scores[at]);
      }
      left.positions.swap(state.positions);
      left.scores.swap(state.scores);
    }
    for (int i = static_cast<int>(state.positions.size()); i < held; ++i) {
      state.add(position(i), 0.0f);
    }
  }

  // The heads' scores of a sequence become their mean, in which a token counts as 0 where a head does
  // not hold it: pinned ones differ from head to head.
  void share(const CacheView& view, int sequence) {
    const int heads = view.num_kv_heads();
    const auto state_of = [&](int h) -> Row& {
      return rows_.at(view.layer(), sequence * heads + h);
    };
    size_t length = 0;
    for (int h = 0; h < heads; ++h) {
      const Row& head = state_of(h);
      if (!head.positions.empty()) {
        length = std::max(length, static_cast<size_t>(head.positions.back()) + 1);
      }
    }
    std::vector<float> sum(length, 0.0f);
    const auto for_each = [&](auto&& visit) {
      for (int h = 0; h < heads; ++h) {
        Row& head = state_of(h);
        for (size_t i = 0; i < head.positions.size(); ++i) {
          visit(sum[static_cast<size_t>(head.positions[i])], head.scores[i]);
        }
      }
    };
    for_each([](float& of_all, float score) { of_all += score; });
    for_each([&](float of_all, float& score) { score = of_all / static_cast<float>(heads); });
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
