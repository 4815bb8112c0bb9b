#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/common/project_value.h"
#include "plugins/sdk/keep_list.h"
#include "plugins/sdk/state.h"
#include "selectors/criticalkv/criticalkv.h"

namespace sikv::criticalkv {
namespace {

class CriticalKv final : public WrappingSelector {
 public:
  explicit CriticalKv(const CreateArgs& args)
      : WrappingSelector(args),
        first_stage_(args.options.number("first_stage")),
        epsilon_(args.options.number("epsilon")),
        group_(args.group()),
        host_(args.host),
        norms_(args.shape) {
    if (!base_.evicts() || !base_.scores()) {
      throw Refused(
          "criticalkv refines the choice of a base that evicts tokens and tells their scores, and "
          "this one does not: wrap snapkv, adakv, h2o or another such");
    }
  }

  void begin_sequence(int sequence) override {
    base_.begin_sequence(sequence);
    norms_.reset(sequence);
  }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch launch) override {
    base_.observe(args, launch);
    const RowsView values(args.values);
    for (const NewTokens& tokens : newly_encoded(args, view)) {
      std::vector<float>& norms = norms_.at(view.layer(), tokens.row);
      norms.assign(static_cast<size_t>(tokens.count), 0.0f);
      parallel_for(host_, tokens.count, [&](int64_t t, int32_t) {
        norms[static_cast<size_t>(t)] = mean_norm(args, view, values, tokens, static_cast<int>(t));
      });
    }
  }

  void evict(const sikv_evict_args& args, const CacheView& view, Launch launch) override {
    const std::vector<float> scores = base_scores(base_, view, launch);
    base_.evict(args, launch);
    const std::vector<RankedRow> rows = ranked_rows(args, view, scores);
    for (int row = 0; row < view.num_rows(); ++row) {
      const RankedRow& ranked = rows[static_cast<size_t>(row)];
      const std::vector<float>& norms = norms_.at(view.layer(), row);
      // Tokens of decode have no norm, since w_o comes with the prompt only: the base decides.
      const auto has_norm = [&](int32_t slot) {
        return view.position(row, slot) < static_cast<int>(norms.size());
      };
      if (ranked.keeps_all ||
          !std::all_of(ranked.competing.begin(), ranked.competing.end(), has_norm)) {
        continue;
      }
      write_keep_list(args, view, row, ranked.fixed, choose(ranked, view, row, norms));
    }
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = base_.state_bytes();
    for (const std::vector<float>& norms : norms_) bytes += norms.size() * sizeof(float);
    return bytes;
  }

 private:
  // Of one value, the mean over the group's heads of the L1 norm of what each makes of it.
  float mean_norm(const sikv_observe_args& args, const CacheView& view, const RowsView& values,
                  const NewTokens& tokens, int t) const {
    const int dim = view.head_dim();
    std::vector<float> v(static_cast<size_t>(dim)), product(static_cast<size_t>(args.hidden));
    values.load(tokens.sequence, t, tokens.head, dim, v.data());
    double sum = 0.0;
    for (int g = 0; g < group_; ++g) {
      const int64_t first = int64_t{tokens.head * group_ + g} * dim;
      project_value(v.data(), args.w_o + first * args.hidden, dim, args.hidden, product.data());
      for (const float x : product) sum += std::abs(x);
    }
    return static_cast<float>(sum / group_);
  }

  // Stage 1 by score; stage 2 fills the budget by score times norm. Ascending.
  std::vector<int32_t> choose(const RankedRow& ranked, const CacheView& view, int row,
                              const std::vector<float>& norms) const {
    const auto by_score = static_cast<int64_t>(first_stage_ * static_cast<double>(ranked.budget));
    const std::vector<int32_t> first = best_slots(ranked.competing, ranked.scores, by_score);
    std::vector<int32_t> rest;
    std::set_difference(ranked.competing.begin(), ranked.competing.end(), first.begin(),
                        first.end(), std::back_inserter(rest));
    std::vector<float> weighted(ranked.scores.begin(), ranked.scores.end());
    for (const int32_t slot : rest) {
      const auto i = static_cast<size_t>(slot);
      weighted[i] = static_cast<float>((weighted[i] + epsilon_) *
                                       norms[static_cast<size_t>(view.position(row, slot))]);
    }
    const std::vector<int32_t> second =
        best_slots(std::move(rest), weighted, ranked.budget - std::ssize(first));
    std::vector<int32_t> chosen;
    std::merge(first.begin(), first.end(), second.begin(), second.end(),
               std::back_inserter(chosen));
    return chosen;
  }

  const double first_stage_, epsilon_;
  const int group_;
  const sikv_host& host_;
  RowState<std::vector<float>> norms_;  // by position
};

}  // namespace

std::unique_ptr<EvictingSelector> make_ref(const CreateArgs& args) {
  return std::make_unique<CriticalKv>(args);
}

}  // namespace sikv::criticalkv
