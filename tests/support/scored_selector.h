// A selector whose scores and keep-lists a test writes down: the base of wrappers that evict.
#ifndef SIKV_TESTS_SUPPORT_SCORED_SELECTOR_H_
#define SIKV_TESTS_SUPPORT_SCORED_SELECTOR_H_

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "plugins/sdk/plugin.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {

// What the base answers, by row; SIKV_SELECT_ALL in a keep-list of one entry keeps the row.
struct ScoredAnswers {
  std::vector<std::vector<float>> scores;
  std::vector<std::vector<int32_t>> keep;
};

namespace scored {

inline ScoredAnswers& answers() {
  static ScoredAnswers answers;
  return answers;
}

class Scored final : public ScoringSelector {
 public:
  Plan plan() override { return {1 << 20, 0}; }
  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) SelectionRow(args.selection, row).select_all();
  }
  void score(const sikv_score_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      const auto& scores = answers().scores.at(static_cast<size_t>(row));
      std::copy(scores.begin(), scores.end(),
                args.scores + int64_t{row} * view.raw().max_encoded_len);
    }
  }
  void evict(const sikv_evict_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      const auto& keep = answers().keep.at(static_cast<size_t>(row));
      const bool all = keep == std::vector<int32_t>{SIKV_SELECT_ALL};
      args.keep_counts[row] = all ? SIKV_SELECT_ALL : static_cast<int32_t>(keep.size());
      std::copy(keep.begin(), keep.end(),
                args.keep_slots + int64_t{row} * view.raw().max_encoded_len);
    }
  }
};

inline std::unique_ptr<ScoringSelector> make(const CreateArgs&) {
  return std::make_unique<Scored>();
}

inline const Variant& variant() {
  static const Registry* registry = [] {
    auto* made = new Registry();
    const sikv_plugin_entry entry = scoring_selector<make, kNoOptions>("ref");
    const sikv_plugin_tables_t tables = {sizeof tables, 1, &entry};
    made->add_linked(
        "linked/scored",
        sdk::descriptor("scored", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR), "", ""),
        &tables);
    return made;
  }();
  return registry->variants().front();
}

}  // namespace scored

// `wrapper` around it; `base` puts another wrapper in between.
inline SelectorInstance wrap_scored(const Variant& wrapper, const Choices& choices,
                                    const sikv_shape& shape,
                                    std::unique_ptr<SelectorInstance> base = nullptr) {
  if (base == nullptr) {
    base = std::make_unique<SelectorInstance>(scored::variant(), OptionSet(), shape, cpu().info(),
                                              cpu().host());
  }
  Choices own = choices;
  own.emplace_back("base", base->variant().id);
  return {wrapper,      OptionSet::parse(wrapper.options, own, wrapper.id),
          shape,        cpu().info(),
          cpu().host(), std::move(base)};
}

// The keep-lists of all rows; {SIKV_SELECT_ALL} where a row is kept.
inline std::vector<std::vector<int32_t>> evictions(SelectorInstance& selector,
                                                   const TestCache& cache) {
  const sikv_cache_view& view = cache.view();
  const auto rows = static_cast<size_t>(cache.num_rows()),
             stride = static_cast<size_t>(view.max_encoded_len);
  std::vector<int32_t> slots(rows * stride, -7), counts(rows, -7);
  selector.evict({sizeof(sikv_evict_args), 0, &view, slots.data(), counts.data()}, nullptr,
                 nullptr);
  std::vector<std::vector<int32_t>> lists;
  for (size_t row = 0; row < rows; ++row) {
    if (counts[row] == SIKV_SELECT_ALL) {
      lists.push_back({SIKV_SELECT_ALL});
    } else {
      const auto first = slots.begin() + static_cast<int64_t>(row * stride);
      lists.emplace_back(first, first + counts[row]);
    }
  }
  return lists;
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_SCORED_SELECTOR_H_
