#include <algorithm>
#include <vector>

#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/select.h"
#include "selectors/streaming/streaming.h"

namespace sikv::streaming {
namespace {

bool shares_bytes(const sikv_layout& layout) {
  return std::any_of(layout.planes, layout.planes + layout.num_planes,
                     [](const sikv_plane& plane) { return plane.organisation == SIKV_SHARED; });
}

// `slots` (ascending) completed to whole pages of a row of `encoded` tokens.
std::vector<int32_t> whole_pages(std::span<const int32_t> slots, int encoded) {
  std::vector<int32_t> pages;
  int next = 0;  // first slot that is not yet in
  for (int32_t slot : slots) {
    const int end = std::min((slot / kPageTokens + 1) * kPageTokens, encoded);
    for (next = std::max(next, slot / kPageTokens * kPageTokens); next < end; ++next) {
      pages.push_back(next);
    }
  }
  return pages;
}

class Streaming : public EvictingSelector {
 public:
  explicit Streaming(const CreateArgs& args)
      : budget_(args.options.budget("budget")),
        sinks_(static_cast<int32_t>(args.options.integer("sinks"))),
        evict_(args.options.flag("evict")),
        shape_(args.shape) {
    if (evict_ && budget_.count < 0) {
      throw Refused(
          "streaming(evict=true) takes its budget in tokens: a fraction of what is left would "
          "shrink with every eviction");
    }
  }

  Plan plan() override { return {selection_capacity(budget_, shape_), 0}; }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      SelectionRow out(args.selection, row);
      out.clear();
      for (int32_t slot : sinks_and_window(view, row)) out.push(slot);
      cost_.add(0);
    }
  }

  // Keeps what run would select, and the pinned tokens. Where tokens share bytes whole pages stay:
  // groups then hold together and the next page starts at a multiple of 256.
  void evict(const sikv_evict_args& args, const CacheView& view, Launch) override {
    const bool shared =
        shares_bytes(*view.raw().key.layout) || shares_bytes(*view.raw().value.layout);
    for (int row = 0; row < view.num_rows(); ++row) {
      args.keep_counts[row] = SIKV_SELECT_ALL;
      if (!evict_) continue;
      const std::vector<int32_t> unpinned = sinks_and_window(view, row);
      const auto pinned = view.pinned_slots(row);
      std::vector<int32_t> keep;
      std::merge(unpinned.begin(), unpinned.end(), pinned.begin(), pinned.end(),
                 std::back_inserter(keep));
      if (shared) keep = whole_pages(keep, view.encoded_len(row));
      if (std::ssize(keep) == view.encoded_len(row)) continue;
      std::copy(keep.begin(), keep.end(),
                args.keep_slots + int64_t{row} * view.raw().max_encoded_len);
      args.keep_counts[row] = static_cast<int32_t>(keep.size());
    }
  }

  void counters(const std::function<void(std::string_view, double)>& push) const override {
    cost_.push(push);
  }

 private:
  // Ascending: unpinned slots below `sinks`, then the newest, `budget` together.
  std::vector<int32_t> sinks_and_window(const CacheView& view, int row) const {
    std::vector<int32_t> slots;
    for_each_unpinned(view.encoded_len(row), view.pinned_slots(row),
                      [&](int32_t slot) { slots.push_back(slot); });
    const int64_t budget = std::min<int64_t>(budget_.tokens(view.length(row)), std::ssize(slots));
    const int64_t sinks = std::min<int64_t>(
        std::lower_bound(slots.begin(), slots.end(), sinks_) - slots.begin(), budget);
    slots.erase(slots.begin() + sinks, slots.end() - (budget - sinks));
    return slots;
  }

  Budget budget_;
  int32_t sinks_;
  bool evict_;
  sikv_shape shape_;
  ScanCost cost_;
};

}  // namespace

std::unique_ptr<EvictingSelector> make_ref(const CreateArgs& args) {
  return std::make_unique<Streaming>(args);
}

}  // namespace sikv::streaming
