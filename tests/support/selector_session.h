// A selector at work on a test cache.
#ifndef SIKV_TESTS_SUPPORT_SELECTOR_SESSION_H_
#define SIKV_TESTS_SUPPORT_SELECTOR_SESSION_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "plugins/sdk/options.h"
#include "tests/support/counters.h"
#include "tests/support/device_call.h"
#include "tests/support/guarded.h"
#include "tests/support/queries.h"

namespace sikv::testing {

using Slots = std::vector<int32_t>;

// Slots of a row that may be selected.
inline Slots candidates(const TestCache& cache, int row) {
  const sikv_cache_view& view = cache.view();
  Slots all(static_cast<size_t>(view.encoded_len[row]));
  std::iota(all.begin(), all.end(), 0);
  const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  Slots open;
  std::set_difference(all.begin(), all.end(), pinned, pinned + view.pinned_len[row],
                      std::back_inserter(open));
  return open;
}

// Selections of two implementations: another order of summation moves a score by about 1e-6 of the
// spread of all of them, which swaps one pair at the cut at most.
inline void expect_equal_but_for_the_cut(const std::vector<Slots>& got,
                                         const std::vector<Slots>& want) {
  for (size_t row = 0; row < want.size(); ++row) {
    SCOPED_TRACE("row " + std::to_string(row));
    ASSERT_EQ(got[row].size(), want[row].size());
    Slots common;
    std::set_intersection(got[row].begin(), got[row].end(), want[row].begin(), want[row].end(),
                          std::back_inserter(common));
    ASSERT_GE(common.size() + 1, want[row].size());
  }
}

// A selector at work on one cache; every selection it makes is checked against the contract.
class SelectorSession {
 public:
  SelectorSession(const Variant& variant, const Choices& choices, const FilledCache& filled,
                  int group, int threads = 1)
      : filled_(filled),
        group_(group),
        options_(OptionSet::parse(variant.options, own_choices(variant, choices), variant.id)),
        device_(device_of(variant, threads)),
        selector_(
            make_selector(variant, choices, tight_shape(filled.cache.spec(), group), device_)),
        refusal_(selector_.refusal(filled.key.describe())) {
    if (!accepted()) return;
    const SelectorInstance::Plan plan = selector_.plan();
    capacity_ = plan.capacity;
    const auto rows = static_cast<size_t>(filled.cache.num_rows());
    slots_.emplace(rows * static_cast<size_t>(capacity_));
    counts_.emplace(rows);
    workspace_.emplace(plan.workspace_bytes);
    if (selector_.weighs()) {
      log_weights_.emplace(rows * static_cast<size_t>(group) * static_cast<size_t>(capacity_));
    }
  }

  int hidden_size = 131;        // of w_o, for selectors that need it
  bool exceeds_budget = false;  // as its options say: then only the plan bounds a selection

  bool accepted() const { return refusal_.empty(); }
  SelectorInstance& selector() { return selector_; }
  const SelectorInstance& selector() const { return selector_; }
  Workspace& workspace() { return *workspace_; }

  // A prompt of the first prompt[b] tokens of every sequence.
  void observe(const std::vector<int>& prompt) {
    const std::vector<int> start(prompt.size(), 0);
    const RowsPart keys = filled_.k.part(start, prompt), values = filled_.v.part(start, prompt);
    const uint32_t needs = selector_.table().flags;
    const int window = (needs & SIKV_SELECTOR_NEEDS_ALL_QUERIES) != 0
                           ? *std::max_element(prompt.begin(), prompt.end())
                           : std::min(4, *std::min_element(prompt.begin(), prompt.end()));
    const std::vector<uint8_t> queries = gaussian_queries(spec(), group_, window, 100);
    std::vector<float> w_o;
    const int hidden = (needs & SIKV_SELECTOR_NEEDS_W_O) != 0 ? hidden_size : 0;
    const int64_t rows = int64_t{filled_.cache.view().num_kv_heads} * group_ * spec().head_dim;
    Random random(derive_seed(spec().seed, 200));
    for (int64_t i = 0; i < rows * hidden; ++i) w_o.push_back(static_cast<float>(random.normal()));
    for (int b = 0; b < filled_.cache.num_sequences(); ++b) selector_.begin_sequence(b);
    device_.synchronize();
    workspace_->make_dirty();
    DeviceCall call(device_);
    selector_.observe({sizeof(sikv_observe_args), window, &call.view(filled_.cache),
                       call.rows(keys), call.rows(values), call.in(queries), call.in(keys.count),
                       hidden == 0 ? nullptr : call.in(w_o), hidden, 0},
                      call.out(*workspace_), call.stream());
    call.finish();
    check_memory();
  }
  void observe_everything() {
    std::vector<int> prompt = spec().encoded;
    for (size_t b = 0; b < prompt.size(); ++b) prompt[b] += spec().tail[b];
    observe(prompt);
  }

  // Sequences get the page of 256 tokens that starts at first[b]; none where that is negative.
  void observe_page(const std::vector<int>& first) {
    std::vector<int> from, count;
    std::vector<int32_t> first_slot;
    for (size_t b = 0; b < first.size(); ++b) {
      from.push_back(std::max(first[b], 0));
      count.push_back(first[b] >= 0 ? SIKV_PAGE_TOKENS : 0);
      first_slot.insert(first_slot.end(), static_cast<size_t>(spec().num_kv_heads), from.back());
    }
    const RowsPart keys = filled_.k.part(from, count), values = filled_.v.part(from, count);
    workspace_->make_dirty();
    DeviceCall call(device_);
    selector_.observe_page({sizeof(sikv_observe_page_args), 0, &call.view(filled_.cache),
                            call.rows(keys), call.rows(values), call.in(first_slot)},
                           call.out(*workspace_), call.stream());
    call.finish();
    check_memory();
  }

  // The selections of all rows; SIKV_SELECT_ALL is spelt out.
  std::vector<Slots> select(int64_t step, const std::vector<uint8_t>& q) {
    begin_step(step);
    DeviceCall call(device_);
    run(place(call, q), call);
    call.finish();
    return collect();
  }
  // Of the last selection, [B, Hq, capacity], of selectors that weigh.
  std::span<const float> log_weights() const {
    return {log_weights_->data(), log_weights_->size()};
  }
  int32_t capacity() const { return capacity_; }
  // The parts of a step, for tests that record it: begin_step, place, run, call.finish(), collect.
  void begin_step(int64_t step) {
    slots_->poison();
    counts_->poison();
    if (log_weights_) log_weights_->poison();
    workspace_->make_dirty();
    selector_.begin_step(step);
  }
  struct Placed {
    sikv_select_args args;
    void* workspace;
  };
  Placed place(DeviceCall& call, const std::vector<uint8_t>& q) {
    const sikv_cache_view& view = call.view(filled_.cache);
    const float scale = 1.0f / std::sqrt(static_cast<float>(view.head_dim));
    return {{sizeof(sikv_select_args),
             view.num_kv_heads * group_,
             &view,
             call.in(q),
             scale,
             0,
             {call.out(*slots_), call.out(*counts_), capacity_, 0},
             log_weights_ ? call.out(*log_weights_) : nullptr},
            call.out(*workspace_)};
  }
  void run(const Placed& placed, const DeviceCall& call) {
    selector_.run(placed.args, placed.workspace, call.stream());
  }
  std::vector<Slots> collect() {
    check_memory();
    std::vector<Slots> rows;
    for (int row = 0; row < filled_.cache.num_rows(); ++row) rows.push_back(checked(row));
    return rows;
  }
  std::vector<Slots> select(int64_t step) {
    return select(step, gaussian_queries(spec(), group_, 1,
                                         derive_seed(spec().seed, static_cast<uint64_t>(step))));
  }

 private:
  const CacheSpec& spec() const { return filled_.cache.spec(); }

  void check_memory() const {
    EXPECT_TRUE(slots_->intact()) << "written outside of the selection's slots";
    EXPECT_TRUE(counts_->intact()) << "written outside of the selection's counts";
    if (log_weights_) {
      EXPECT_TRUE(log_weights_->intact()) << "written outside of the weights";
    }
    EXPECT_TRUE(workspace_->intact()) << "written outside of the workspace";
    EXPECT_EQ(filled_.cache.damage(), "");
  }

  Slots checked(int row) const {
    SCOPED_TRACE("row " + std::to_string(row));
    const sikv_selector_table& table = selector_.table();
    const Slots open = candidates(filled_.cache, row);
    const int32_t count = (*counts_)[static_cast<size_t>(row)];
    if (count == SIKV_SELECT_ALL) return open;
    EXPECT_FALSE(table.flags & SIKV_SELECTOR_SELECTS_ALL) << "lists slots, said it selects all";
    EXPECT_GE(count, 0);
    EXPECT_LE(count, capacity_);
    if (const sikv_option_value* budget = options_.find("budget"); budget && !exceeds_budget) {
      const sikv_cache_view& view = filled_.cache.view();
      const int64_t length = view.encoded_len[row] + view.tail_len[row / view.num_kv_heads];
      EXPECT_LE(count, (Budget{budget->i, budget->f}.tokens(length)));
    }
    if (count < 0 || count > capacity_) return {};
    const int32_t* first = slots_->data() + int64_t{row} * capacity_;
    Slots slots(first, first + count);
    if (table.flags & SIKV_SELECTOR_UNORDERED) std::sort(slots.begin(), slots.end());
    for (size_t i = 1; i < slots.size(); ++i) {
      EXPECT_LT(slots[i - 1], slots[i]) << "slots are not ascending and unique";
    }
    for (int g = 0; log_weights_ && g < group_; ++g) {
      const float* const weights = log_weights_->data() + (int64_t{row} * group_ + g) * capacity_;
      for (int32_t i = 0; i < count; ++i) {
        EXPECT_LT(weights[i], std::numeric_limits<float>::infinity())
            << "head " << g << " place " << i;
      }
    }
    EXPECT_TRUE(std::includes(open.begin(), open.end(), slots.begin(), slots.end()))
        << "a slot is pinned or beyond the encoded length";
    return slots;
  }

  const FilledCache& filled_;
  int group_;
  OptionSet options_;
  Device& device_;
  SelectorInstance selector_;
  std::string refusal_;
  int32_t capacity_ = 0;
  std::optional<Guarded<int32_t>> slots_, counts_;
  std::optional<Guarded<float>> log_weights_;
  std::optional<Workspace> workspace_;
};

inline std::map<std::string, double> counters_of(const SelectorSession& session) {
  return counters_of(session.selector());
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_SELECTOR_SESSION_H_
