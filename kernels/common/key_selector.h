// Skeleton of selectors that keep something of every key, score all encoded tokens from it and take
// the best. A method says what is kept, what is fitted on the prompt, and how a query scores.
//
// Scores are the mean over the group's heads of each head's softmax over the row's encoded tokens;
// of one head, or where a method scores the group as one, they are the logits themselves.
#ifndef SIKV_KERNELS_COMMON_KEY_SELECTOR_H_
#define SIKV_KERNELS_COMMON_KEY_SELECTOR_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/common/row_math.h"
#include "plugins/sdk/plugin.h"
#include "plugins/sdk/state.h"

namespace sikv {

// A row's prompt, for fitting.
struct PromptRow {
  const sikv_observe_args& args;
  int layer, row, head_dim;
  std::vector<float> keys;  // [count, D]
  int count;
};

// What is asked of a row.
struct RowQuery {
  const CacheView& view;
  int row;
  const float* heads;  // [G, D]
  int group, head_dim;
  float scale;     // of the logits
  int64_t tokens;  // positions 0 .. tokens - 1 are to be scored
  int64_t budget;  // of slots
};

// State: default constructed for a new sequence; has bytes() and tokens(), positions kept.
template <typename State>
class KeySelector : public Selector {
 public:
  KeySelector(const CreateArgs& args, const RowMath& math, int64_t fit_tokens)
      : budget_(args.options.budget("budget")),
        fit_tokens_(fit_tokens),
        shape_(args.shape),
        host_(args.host),
        math_(math),
        states_(shape_),
        scratch_(static_cast<size_t>(std::max(args.device.num_threads, 1))) {}

  Plan plan() override { return {selection_capacity(budget_, shape_), 0}; }
  void begin_sequence(int sequence) override { states_.reset(sequence); }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    const RowsView keys(args.keys);
    parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t) {
      const int row = static_cast<int>(i);
      const int b = row / view.num_kv_heads(), h = row % view.num_kv_heads();
      int count = keys.count(b);
      if (count == 0) return;
      if (fit_tokens_ > 0) count = static_cast<int>(std::min<int64_t>(count, fit_tokens_));
      const int dim = view.head_dim();
      PromptRow prompt{args,
                       view.layer(),
                       row,
                       dim,
                       std::vector<float>(static_cast<size_t>(count) * static_cast<size_t>(dim)),
                       count};
      for (int t = 0; t < count; ++t) {
        keys.load(b, t, h, dim, prompt.keys.data() + int64_t{t} * dim);
      }
      fit(prompt, states_.at(view.layer(), row));
    });
    keep(view.layer(), keys, newly_encoded(args, view));
  }
  void observe_page(const sikv_observe_page_args& args, const CacheView& view, Launch) override {
    keep(view.layer(), RowsView(args.keys), newly_encoded(args, view));
  }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    const QueryView queries(args.q, view, args.num_query_heads);
    parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t worker) {
      Scratch& scratch = scratch_[static_cast<size_t>(worker)];
      const int row = static_cast<int>(i), n = view.encoded_len(row);
      SelectionRow out(args.selection, row);
      ++scratch.runs;
      out.clear();
      if (n == 0) return;
      const State& state = states_.at(view.layer(), row);
      const int64_t tokens = view.position(row, n - 1) + 1;
      if (tokens > state.tokens()) {
        throw PluginBug("position " + std::to_string(tokens - 1) + " was never observed");
      }
      const int group = queries.group(), dim = view.head_dim();
      const int64_t stride = score_room(tokens);
      scratch.heads.resize(static_cast<size_t>(group * dim));
      scratch.logits.resize(static_cast<size_t>(group * stride));
      queries.load_group(row, scratch.heads.data());
      const int64_t budget = budget_.tokens(view.length(row));
      const RowQuery query{view, row, scratch.heads.data(), group, dim, args.scale, tokens, budget};
      float* logits = scratch.logits.data();
      const int heads = score(query, state, logits, stride);
      scratch.bytes += static_cast<double>(scan_bytes(query, state));
      if (view.raw().positions != nullptr) {
        // Slots keep the order of positions, so none is overwritten before it is read.
        for (int h = 0; h < heads; ++h) {
          float* head = logits + h * stride;
          for (int slot = 0; slot < n; ++slot) head[slot] = head[view.position(row, slot)];
        }
      }
      float* scores = logits;
      if (heads > 1) {
        scratch.probability.resize(static_cast<size_t>(stride));
        scores = scratch.probability.data();
        math_.mean_softmax(logits, stride, heads, n, scores);
      }
      force(query, scores);
      math_.select({scores, static_cast<size_t>(n)}, view.pinned_slots(row), budget, out);
    });
  }

  uint64_t state_bytes() const override {
    return std::accumulate(states_.begin(), states_.end(), uint64_t{0},
                           [](uint64_t sum, const State& state) { return sum + state.bytes(); });
  }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    double runs = 0.0, bytes = 0.0;
    for (const Scratch& scratch : scratch_) runs += scratch.runs, bytes += scratch.bytes;
    push("runs", runs);
    push("scan_bytes", bytes);
  }

 protected:
  virtual void fit(const PromptRow& /*prompt*/, State& /*state*/) {}
  // Keys [count, D] of positions first .. first + count - 1.
  virtual void add(const float* keys, int count, int64_t first, State& state) = 0;
  // Fills logits [heads, stride] by position and returns heads: G, or 1.
  virtual int score(const RowQuery& query, const State& state, float* logits, int64_t stride) = 0;
  // Bytes that score read.
  virtual uint64_t scan_bytes(const RowQuery& query, const State& state) const = 0;
  // Sets the scores [encoded_len] of slots that are taken first to +inf.
  virtual void force(const RowQuery& /*query*/, float* /*scores*/) const {}
  // Of one slot. True if it comes out of the budget, as pinned ones do not.
  static bool take(const RowQuery& query, int64_t slot, float* scores) {
    scores[slot] = std::numeric_limits<float>::infinity();
    const auto pinned = query.view.pinned_slots(query.row);
    return !std::binary_search(pinned.begin(), pinned.end(), slot);
  }
  // Of the encoded ones of the `count` newest tokens, as far as `room` of the budget goes: of more
  // than that the oldest would be selected, since ties go to the lower slot.
  static void take_newest(const RowQuery& query, int64_t count, int64_t room, float* scores) {
    const CacheView& view = query.view;
    const int64_t n = view.encoded_len(query.row);
    count = std::clamp<int64_t>(count - view.tail_len(query.row / view.num_kv_heads()), 0, n);
    for (int64_t slot = n - 1; slot >= n - count && room > 0; --slot) {
      if (take(query, slot, scores)) --room;
    }
  }

  const sikv_shape& shape() const { return shape_; }
  const RowMath& math() const { return math_; }

 private:
  // Of one worker, on cache lines of its own.
  struct alignas(64) Scratch {
    std::vector<float> heads, logits, probability;
    double runs = 0.0, bytes = 0.0;
  };

  void keep(int layer, const RowsView& keys, const std::vector<NewTokens>& encoded) {
    parallel_for(host_, std::ssize(encoded), [&](int64_t i, int32_t) {
      const NewTokens& rows = encoded[static_cast<size_t>(i)];
      const int dim = shape_.head_dim;
      std::vector<float> block(static_cast<size_t>(SIKV_PAGE_TOKENS * dim));
      for (int first = 0; first < rows.count; first += SIKV_PAGE_TOKENS) {
        const int count = std::min(SIKV_PAGE_TOKENS, rows.count - first);
        for (int t = 0; t < count; ++t) {
          keys.load(rows.sequence, first + t, rows.head, dim, block.data() + t * dim);
        }
        add(block.data(), count, rows.first_position + first, states_.at(layer, rows.row));
      }
    });
  }

  Budget budget_;
  int64_t fit_tokens_;
  sikv_shape shape_;
  const sikv_host& host_;
  const RowMath& math_;
  RowState<State> states_;
  std::vector<Scratch> scratch_;
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_KEY_SELECTOR_H_
