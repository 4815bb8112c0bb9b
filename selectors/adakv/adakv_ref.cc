#include <algorithm>
#include <vector>

#include "plugins/sdk/keep_list.h"
#include "plugins/sdk/split.h"
#include "plugins/sdk/state.h"
#include "selectors/adakv/adakv.h"

namespace sikv::adakv {
namespace {

// Of all competing slots of the heads, how many of each head are among the `total` best; ties to
// the lower head, then to the lower slot.
std::vector<int64_t> winners_by_head(std::span<const RankedRow> heads, int64_t total) {
  struct Entry {
    float score;
    size_t head;
  };
  std::vector<Entry> all;
  for (size_t h = 0; h < heads.size(); ++h) {
    for (const int32_t slot : heads[h].competing) {
      all.push_back({heads[h].scores[static_cast<size_t>(slot)], h});
    }
  }
  const auto better = [](const Entry& a, const Entry& b) {
    return a.score > b.score || (a.score == b.score && a.head < b.head);
  };
  std::nth_element(all.begin(), all.begin() + total, all.end(), better);
  std::vector<int64_t> winners(heads.size(), 0);
  for (int64_t i = 0; i < total; ++i) ++winners[all[static_cast<size_t>(i)].head];
  return winners;
}

class AdaKv final : public WrappingSelector {
 public:
  explicit AdaKv(const CreateArgs& args)
      : WrappingSelector(args), alpha_(args.options.number("alpha")), totals_(args.shape) {
    if (!base_.evicts() || !base_.scores()) {
      throw Refused(
          "adakv splits the budget of a base that evicts tokens and tells their scores, and this "
          "one does not: wrap snapkv, pyramidkv, h2o or another such");
    }
  }

  void begin_sequence(int sequence) override {
    base_.begin_sequence(sequence);
    totals_.reset(sequence);
  }

  void evict(const sikv_evict_args& args, const CacheView& view, Launch launch) override {
    // Before the base forgets, by its own evict, what it does not keep.
    const std::vector<float> scores = base_scores(base_, view, launch);
    base_.evict(args, launch);
    const std::vector<RankedRow> rows = ranked_rows(args, view, scores);
    const auto heads = static_cast<size_t>(view.num_kv_heads());
    for (size_t first = 0; first < rows.size(); first += heads) {
      split(args, view, static_cast<int>(first), std::span(rows).subspan(first, heads));
    }
  }

 private:
  // The heads of one sequence share what the base gave them together.
  void split(const sikv_evict_args& args, const CacheView& view, int first_row,
             std::span<const RankedRow> heads) {
    if (std::all_of(heads.begin(), heads.end(), [](const RankedRow& h) { return h.keeps_all; })) {
      return;
    }
    int64_t given = 0, always_kept = 0, competing = 0;
    for (size_t h = 0; h < heads.size(); ++h) {
      given += heads[h].budget;
      competing += std::ssize(heads[h].competing);
      always_kept += std::ssize(heads[h].fixed) -
                     std::ssize(view.pinned_slots(first_row + static_cast<int>(h)));
    }
    // A base that cuts again, while text is generated, finds heads that hold less than it would give:
    // what these lack stays the sequence's, or the total would shrink with every cut.
    int64_t& promised = totals_.at(view.layer(), first_row);
    promised = std::max(promised, given + always_kept);
    const int64_t total = std::min(promised - always_kept, competing);
    const double lack = static_cast<double>(total - given),
                 spare = static_cast<double>(std::max<int64_t>(competing - given, 1));
    const std::vector<int64_t> winners = winners_by_head(heads, total);
    std::vector<double> wanted;
    for (size_t h = 0; h < heads.size(); ++h) {
      const double own = static_cast<double>(heads[h].budget),
                   room = static_cast<double>(std::ssize(heads[h].competing)) - own;
      wanted.push_back((1 - alpha_) * static_cast<double>(winners[h]) +
                       alpha_ * (own + lack * room / spare));
    }
    const std::vector<int64_t> budgets = split_by_largest_remainder(wanted, total);
    for (size_t h = 0; h < heads.size(); ++h) {
      write_keep_list(args, view, first_row + static_cast<int>(h), heads[h].fixed,
                      best_slots(heads[h].competing, heads[h].scores, budgets[h]));
    }
  }

  const double alpha_;
  RowState<int64_t> totals_;  // of a sequence, at its first head; 0 before anything is evicted
};

}  // namespace

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) {
  return std::make_unique<AdaKv>(args);
}

}  // namespace sikv::adakv
