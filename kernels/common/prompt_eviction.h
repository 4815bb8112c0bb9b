// Skeleton of selectors that score a prompt's tokens once and give back all but the best: what is
// left is attended to as a whole. A method says how a row is scored and how many tokens it keeps.
//
//   prompt  | candidates .................................... | window |
//   kept    | the best of them, budget - window               | all    |
//
// The window are the newest positions of the prompt. Of its tokens those in pages count towards the
// budget; pinned ones and the tail do not. Generated tokens stay.
#ifndef SIKV_KERNELS_COMMON_PROMPT_EVICTION_H_
#define SIKV_KERNELS_COMMON_PROMPT_EVICTION_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plugins/sdk/keep_list.h"
#include "plugins/sdk/plugin.h"
#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/state.h"

namespace sikv {

class PromptEviction : public ScoringSelector {
 public:
  PromptEviction(const CreateArgs& args, int window)
      : shape_(args.shape), window_(window), host_(args.host), scores_(args.shape) {}

  Plan plan() override { return {}; }
  void begin_sequence(int sequence) override { scores_.reset(sequence); }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    parallel_for(host_, view.num_rows(), [&](int64_t row, int32_t) {
      const int64_t prompt = args.prompt_len[row / view.num_kv_heads()];
      std::vector<float>& scores = scores_.at(view.layer(), static_cast<int>(row));
      scores = score_row(args, view, static_cast<int>(row));
      std::fill(scores.begin() + std::max<int64_t>(prompt - window_, 0), scores.end(), kAlwaysKept);
    });
  }

  void score(const sikv_score_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      float* const out = args.scores + int64_t{row} * view.raw().max_encoded_len;
      const std::vector<float>& scores = scores_.at(view.layer(), row);
      for (int slot = 0; slot < view.encoded_len(row); ++slot) {
        const auto position = static_cast<size_t>(view.position(row, slot));
        out[slot] = position < scores.size() ? scores[position] : kAlwaysKept;
      }
    }
  }

  // Once per prompt: the scores are dropped with it.
  void evict(const sikv_evict_args& args, const CacheView& view, Launch launch) override {
    std::vector<float> scores(static_cast<size_t>(view.num_rows()) *
                              static_cast<size_t>(view.raw().max_encoded_len));
    score({sizeof(sikv_score_args), 0, &view.raw(), scores.data()}, view, launch);
    for (int row = 0; row < view.num_rows(); ++row) {
      args.keep_counts[row] = SIKV_SELECT_ALL;
      std::vector<float>& state = scores_.at(view.layer(), row);
      if (state.empty()) continue;
      choose(args, view, row, scores, std::ssize(state));
      std::vector<float>().swap(state);  // {} would keep the memory
    }
  }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      SelectionRow(args.selection, row).select_all();
      cost_.add(0);
    }
  }

  void counters(const std::function<void(std::string_view, double)>& push) const override {
    cost_.push(push);
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = 0;
    for (const std::vector<float>& scores : scores_) bytes += scores.capacity() * sizeof(float);
    return bytes;
  }

 protected:
  const sikv_shape& shape() const { return shape_; }
  const sikv_host& host() const { return host_; }
  int window() const { return window_; }
  int group() const { return shape_.num_query_heads / shape_.num_kv_heads; }
  // [prompt_len], finite, or kAlwaysKept like those of the window, which are not asked for.
  virtual std::vector<float> score_row(const sikv_observe_args& args, const CacheView& view,
                                       int row) const = 0;
  // Tokens of a row in pages that stay, `in_window` ones that are always kept included, where
  // `competing` others compete; pinned ones come on top.
  virtual int64_t kept(int layer, int row, int64_t prompt, int64_t competing,
                       int64_t in_window) const = 0;
  // By position, +inf in the window; empty once they were used.
  std::vector<float>& prompt_scores(int layer, int row) { return scores_.at(layer, row); }

 private:
  void choose(const sikv_evict_args& args, const CacheView& view, int row,
              const std::vector<float>& scores, int64_t prompt) const {
    const RankedRow ranked = ranked_row(view, row, scores);
    const int64_t in_window = std::ssize(ranked.fixed) - std::ssize(view.pinned_slots(row));
    const int64_t all = kept(view.layer(), row, prompt, std::ssize(ranked.competing), in_window);
    write_keep_list(
        args, view, row, ranked.fixed,
        best_slots(ranked.competing, ranked.scores, std::max<int64_t>(all - in_window, 0)));
  }

  sikv_shape shape_;
  int window_;
  const sikv_host& host_;
  ScanCost cost_;
  RowState<std::vector<float>> scores_;  // by position; empty once they were used
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_PROMPT_EVICTION_H_
