// Every selector x variant x key layout against the contract of sikv_selector.h.

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <set>

#include "framework/base/error.h"
#include "tests/conformance/cases.h"

namespace sikv::testing {
namespace {

using Slots = std::vector<int32_t>;

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(SelectorConformance);
class SelectorConformance : public ::testing::TestWithParam<const Variant*> {};
INSTANTIATE_TEST_SUITE_P(All, SelectorConformance, ::testing::ValuesIn(cpu_variants(SIKV_SELECTOR)),
                         test_name);

bool has_budget(const Variant& variant) {
  return std::any_of(
      variant.options.begin(), variant.options.end(),
      [](const sikv_option_spec& spec) { return spec.name == std::string("budget"); });
}

// The variant's options with this budget, where it has one.
Choices with_budget(const Variant& variant, Choices choices, const char* budget) {
  if (has_budget(variant)) choices.emplace_back("budget", budget);
  return choices;
}

FilledCache make_cache(const Case& c, const CodecChoice& keys,
                       Pattern pattern = Pattern::kGaussian) {
  return FilledCache(c.cache, make_codec(SIKV_KEY_CODEC, keys, c),
                     make_codec(SIKV_VALUE_CODEC, {"fp16", {}, true}, c), pattern);
}

// Slots of a row that may be selected.
Slots candidates(const TestCache& cache, int row) {
  const sikv_cache_view& view = cache.view();
  Slots all(static_cast<size_t>(view.encoded_len[row]));
  std::iota(all.begin(), all.end(), 0);
  const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  Slots open;
  std::set_difference(all.begin(), all.end(), pinned, pinned + view.pinned_len[row],
                      std::back_inserter(open));
  return open;
}

// A selector at work on one cache; every selection it makes is checked against the contract.
class Session {
 public:
  Session(const Variant& variant, const Choices& choices, const Case& c, const FilledCache& filled,
          int threads = 1)
      : case_(c),
        filled_(filled),
        options_(OptionSet::parse(variant.options, choices, variant.id)),
        selector_(variant, options_, shape_of(c), cpu(threads).info(), cpu(threads).host()),
        refusal_(selector_.refusal(filled.key.describe())) {
    if (!accepted()) return;
    const SelectorInstance::Plan plan = selector_.plan();
    capacity_ = plan.capacity;
    const auto rows = static_cast<size_t>(filled.cache.num_rows());
    slots_.emplace(rows * static_cast<size_t>(capacity_));
    counts_.emplace(rows);
    workspace_.emplace(plan.workspace_bytes);
  }

  bool accepted() const { return refusal_.empty(); }
  SelectorInstance& selector() { return selector_; }

  // A prompt of the first prompt[b] tokens of every sequence.
  void observe(const std::vector<int>& prompt) {
    const std::vector<int> start(prompt.size(), 0);
    const RowsPart keys = filled_.k.part(start, prompt), values = filled_.v.part(start, prompt);
    const int window = std::min(4, *std::min_element(prompt.begin(), prompt.end()));
    const std::vector<uint8_t> queries = make_queries(case_, window, 100);
    const sikv_cache_view view = filled_.cache.view();
    for (int b = 0; b < filled_.cache.num_sequences(); ++b) selector_.begin_sequence(b);
    workspace_->poison();
    selector_.observe({sizeof(sikv_observe_args), window, &view, keys.rows, values.rows,
                       queries.data(), keys.count.data()},
                      workspace_->data(), nullptr);
    check_memory();
  }
  void observe_everything() {
    std::vector<int> prompt = case_.cache.encoded;
    for (size_t b = 0; b < prompt.size(); ++b) prompt[b] += case_.cache.tail[b];
    observe(prompt);
  }

  // Sequences get the page of 256 tokens that starts at first[b]; none where that is negative.
  void observe_page(const std::vector<int>& first) {
    std::vector<int> from, count;
    std::vector<int32_t> first_slot;
    for (size_t b = 0; b < first.size(); ++b) {
      from.push_back(std::max(first[b], 0));
      count.push_back(first[b] >= 0 ? SIKV_PAGE_TOKENS : 0);
      first_slot.insert(first_slot.end(), static_cast<size_t>(case_.cache.num_kv_heads),
                        from.back());
    }
    const RowsPart keys = filled_.k.part(from, count), values = filled_.v.part(from, count);
    const sikv_cache_view view = filled_.cache.view();
    workspace_->poison();
    selector_.observe_page(
        {sizeof(sikv_observe_page_args), 0, &view, keys.rows, values.rows, first_slot.data()},
        workspace_->data(), nullptr);
    check_memory();
  }

  // The selections of all rows; SIKV_SELECT_ALL is spelt out.
  std::vector<Slots> select(int64_t step, const std::vector<uint8_t>& q) {
    const sikv_cache_view view = filled_.cache.view();
    slots_->poison();
    counts_->poison();
    workspace_->poison();
    selector_.begin_step(step);
    const float scale = 1.0f / std::sqrt(static_cast<float>(view.head_dim));
    selector_.run({sizeof(sikv_select_args),
                   view.num_kv_heads * case_.group,
                   &view,
                   q.data(),
                   scale,
                   0,
                   {slots_->data(), counts_->data(), capacity_, 0}},
                  workspace_->data(), nullptr);
    check_memory();
    std::vector<Slots> rows;
    for (int row = 0; row < filled_.cache.num_rows(); ++row) rows.push_back(checked(row));
    return rows;
  }
  std::vector<Slots> select(int64_t step) {
    return select(step, make_queries(case_, 1, static_cast<uint64_t>(step)));
  }

 private:
  void check_memory() const {
    EXPECT_TRUE(slots_->intact()) << "written outside of the selection's slots";
    EXPECT_TRUE(counts_->intact()) << "written outside of the selection's counts";
    EXPECT_TRUE(workspace_->intact()) << "written outside of the workspace";
    EXPECT_EQ(filled_.cache.damage(), "");
  }

  Slots checked(int row) const {
    SCOPED_TRACE("row " + std::to_string(row));
    const sikv_selector_table& table = selector_.variant().selector();
    const Slots open = candidates(filled_.cache, row);
    const int32_t count = (*counts_)[static_cast<size_t>(row)];
    if (count == SIKV_SELECT_ALL) return open;
    EXPECT_FALSE(table.flags & SIKV_SELECTOR_SELECTS_ALL) << "lists slots, said it selects all";
    EXPECT_GE(count, 0);
    EXPECT_LE(count, capacity_);
    if (const sikv_option_value* budget = options_.find("budget")) {
      const sikv_cache_view& view = filled_.cache.view();
      const int64_t length = view.encoded_len[row] + view.tail_len[row / view.num_kv_heads];
      EXPECT_LE(count, Budget({budget->i, budget->f}).tokens(length));
    }
    if (count < 0 || count > capacity_) return {};
    const int32_t* first = slots_->data() + int64_t{row} * capacity_;
    Slots slots(first, first + count);
    if (table.flags & SIKV_SELECTOR_UNORDERED) std::sort(slots.begin(), slots.end());
    for (size_t i = 1; i < slots.size(); ++i) {
      EXPECT_LT(slots[i - 1], slots[i]) << "slots are not ascending and unique";
    }
    EXPECT_TRUE(std::includes(open.begin(), open.end(), slots.begin(), slots.end()))
        << "a slot is pinned or beyond the encoded length";
    return slots;
  }

  Case case_;
  const FilledCache& filled_;
  OptionSet options_;
  SelectorInstance selector_;
  std::string refusal_;
  int32_t capacity_ = 0;
  std::optional<Guarded<int32_t>> slots_, counts_;
  std::optional<Guarded<uint8_t>> workspace_;
};

// Runs body(session, filled) for each case x key layout that the variant reads, and says how many
// there were.
template <typename Body>
int for_each_session(const Variant& variant, const Choices& choices, const std::vector<Case>& cases,
                     const std::vector<CodecChoice>& layouts, Body&& body) {
  int sessions = 0;
  for (const Case& c : cases) {
    for (const CodecChoice& keys : layouts) {
      SCOPED_TRACE(describe(variant.id, choices) + " on " + describe(keys) + ", " + describe(c));
      FilledCache filled = make_cache(c, keys);
      Session session(variant, choices, c, filled);
      if (!session.accepted()) continue;
      ++sessions;
      body(session, filled, c);
      if (::testing::Test::HasFailure()) return sessions;
    }
  }
  return sessions;
}

std::vector<CodecChoice> default_layouts() {
  std::vector<CodecChoice> layouts = all_layouts(SIKV_KEY_CODEC);
  std::erase_if(layouts, [](const CodecChoice& codec) { return !codec.is_default; });
  return layouts;
}

void run_two_steps(Session& session) {
  session.observe_everything();
  session.select(0);
  session.select(1);
}

TEST_P(SelectorConformance, KeepsTheContractOnAwkwardShapes) {
  for (const char* budget : {"0", "1", "7", "96", "0.25"}) {
    const int sessions = for_each_session(
        *GetParam(), with_budget(*GetParam(), {}, budget), awkward_cases(), default_layouts(),
        [](Session& session, FilledCache&, const Case&) { run_two_steps(session); });
    EXPECT_GT(sessions, 0) << "reads no layout of any codec";
  }
}

TEST_P(SelectorConformance, KeepsTheContractOnEveryLayout) {
  for_each_session(*GetParam(), with_budget(*GetParam(), {}, "33"), {awkward_cases()[3]},
                   all_layouts(SIKV_KEY_CODEC),
                   [](Session& session, FilledCache&, const Case&) { run_two_steps(session); });
}

TEST_P(SelectorConformance, KeepsTheContractWithEveryOption) {
  for (const Choices& choices : all_choices(*GetParam())) {
    for_each_session(*GetParam(), with_budget(*GetParam(), choices, "33"),
                     {awkward_cases()[1], awkward_cases()[7]}, default_layouts(),
                     [](Session& session, FilledCache&, const Case&) { run_two_steps(session); });
  }
}

TEST_P(SelectorConformance, KeepsTheContractOnRandomCases) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const std::string budget = std::to_string(Random(seed).below(300));
    for_each_session(*GetParam(), with_budget(*GetParam(), {}, budget.c_str()), {random_case(seed)},
                     default_layouts(),
                     [](Session& session, FilledCache&, const Case&) { run_two_steps(session); });
  }
}

TEST_P(SelectorConformance, SelectsEverythingIfTheBudgetAllows) {
  if (!has_budget(*GetParam())) GTEST_SKIP() << "has no option budget";
  for_each_session(*GetParam(), {{"budget", "1000000"}}, awkward_cases(), default_layouts(),
                   [](Session& session, FilledCache& filled, const Case&) {
                     session.observe_everything();
                     const std::vector<Slots> rows = session.select(0);
                     for (int row = 0; row < filled.cache.num_rows(); ++row) {
                       EXPECT_EQ(rows[static_cast<size_t>(row)], candidates(filled.cache, row));
                     }
                   });
}

TEST_P(SelectorConformance, AnswersTheSameAgainAndWithMoreThreads) {
  const Choices choices = with_budget(*GetParam(), {}, "33");
  for_each_session(*GetParam(), choices, awkward_cases(), default_layouts(),
                   [&](Session& session, FilledCache& filled, const Case& c) {
                     Session threaded(*GetParam(), choices, c, filled, 3);
                     session.observe_everything();
                     threaded.observe_everything();
                     const std::vector<Slots> first = session.select(0);
                     EXPECT_EQ(threaded.select(0), first);
                     EXPECT_EQ(threaded.select(1), session.select(1));
                     // A sequence that starts anew knows nothing of what was before.
                     session.observe_everything();
                     EXPECT_EQ(session.select(0), first);
                   });
}

// A page that came in decode is as good as one of the prompt.
TEST_P(SelectorConformance, FollowsPagesThatComeInDecode) {
  const Case c = make_case({512, 768, 256}, {1, 2, 3}, 16, 2, 3, 64, SIKV_FP16);
  const Choices choices = with_budget(*GetParam(), {}, "40");
  for_each_session(
      *GetParam(), choices, {c}, default_layouts(),
      [&](Session& session, FilledCache& filled, const Case&) {
        const std::vector<int> prompt = {300, 515, 258};  // pages: 1, 2, 1; the rest came later
        for (int row = 0; row < filled.cache.num_rows(); ++row) {
          filled.cache.set_encoded_len(row, prompt[static_cast<size_t>(row / 2)] / 256 * 256);
        }
        session.observe(prompt);
        for (int row = 0; row < filled.cache.num_rows(); ++row) {
          filled.cache.set_encoded_len(row, c.cache.encoded[static_cast<size_t>(row / 2)]);
        }
        session.observe_page({256, 512, -1});
        Session whole(*GetParam(), choices, c, filled);
        whole.observe_everything();
        EXPECT_EQ(session.select(0), whole.select(0));
      });
}

TEST_P(SelectorConformance, MatchesTheReference) {
  if (GetParam()->variant == "ref") GTEST_SKIP() << "is the reference";
  const Variant& ref = find_variant(SIKV_SELECTOR, GetParam()->id, "ref");
  std::vector<Case> cases = awkward_cases();
  for (uint64_t seed = 100; seed < 108; ++seed) cases.push_back(random_case(seed));
  for (const Choices& options : all_choices(*GetParam())) {
    const Choices choices = with_budget(*GetParam(), options, "48");
    for_each_session(*GetParam(), choices, cases, default_layouts(),
                     [&](Session& session, FilledCache& filled, const Case& c) {
                       Session reference(ref, choices, c, filled);
                       session.observe_everything();
                       reference.observe_everything();
                       const std::vector<Slots> got = session.select(0), want = reference.select(0);
                       for (size_t row = 0; row < want.size(); ++row) {
                         SCOPED_TRACE("row " + std::to_string(row));
                         ASSERT_EQ(got[row].size(), want[row].size());
                         Slots common;
                         std::set_intersection(got[row].begin(), got[row].end(), want[row].begin(),
                                               want[row].end(), std::back_inserter(common));
                         // Another order of summation moves a score by about 1e-6 of the spread of
                         // all, which swaps one pair at the cut at most.
                         EXPECT_GE(common.size() + 1, want[row].size());
                       }
                     });
  }
}

TEST_P(SelectorConformance, KeepListsAreListsOfSlots) {
  const Variant& variant = *GetParam();
  if (variant.selector().evict == nullptr) GTEST_SKIP() << "evicts nothing";
  const bool can_evict =
      std::any_of(variant.options.begin(), variant.options.end(),
                  [](const sikv_option_spec& spec) { return spec.name == std::string("evict"); });
  for (const char* budget : {"0", "3", "100"}) {
    Choices choices = with_budget(variant, {}, budget);
    if (can_evict) choices.emplace_back("evict", "true");
    for_each_session(
        variant, choices, awkward_cases(), default_layouts(),
        [&](Session& session, FilledCache& filled, const Case&) {
          session.observe_everything();
          const sikv_cache_view& view = filled.cache.view();
          const auto rows = static_cast<size_t>(filled.cache.num_rows());
          Guarded<int32_t> keep(rows * static_cast<size_t>(view.max_encoded_len));
          Guarded<int32_t> counts(rows);
          session.selector().evict({sizeof(sikv_evict_args), 0, &view, keep.data(), counts.data()},
                                   nullptr, nullptr);
          EXPECT_TRUE(keep.intact() && counts.intact());
          for (size_t row = 0; row < rows; ++row) {
            if (counts[row] == SIKV_SELECT_ALL) continue;
            ASSERT_GE(counts[row], 0);
            ASSERT_LE(counts[row], view.encoded_len[row]);
            const int32_t* list = keep.data() + row * static_cast<size_t>(view.max_encoded_len);
            for (int i = 0; i < counts[row]; ++i) {
              EXPECT_TRUE(list[i] >= (i == 0 ? 0 : list[i - 1] + 1) &&
                          list[i] < view.encoded_len[row]);
            }
          }
        });
  }
}

}  // namespace
}  // namespace sikv::testing
