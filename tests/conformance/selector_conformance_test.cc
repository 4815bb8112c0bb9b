// Every selector x variant x key layout against the contract of sikv_selector.h.

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/conformance/cases.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

bool has_option(const Variant& variant, std::string_view name) {
  return std::any_of(variant.options.begin(), variant.options.end(),
                     [&](const sikv_option_spec& spec) { return spec.name == name; });
}

template <typename Predicate>
std::vector<const Variant*> selectors_that(Predicate&& predicate) {
  std::vector<const Variant*> variants = cpu_variants(SIKV_SELECTOR);
  std::erase_if(variants, [&](const Variant* variant) { return !predicate(*variant); });
  return variants;
}

class SelectorConformance : public ::testing::TestWithParam<const Variant*> {};
INSTANTIATE_TEST_SUITE_P(All, SelectorConformance, ::testing::ValuesIn(cpu_variants(SIKV_SELECTOR)),
                         test_name);

class BudgetConformance : public SelectorConformance {};
INSTANTIATE_TEST_SUITE_P(All, BudgetConformance,
                         ::testing::ValuesIn(selectors_that([](const Variant& variant) {
                           return has_option(variant, "budget");
                         })),
                         test_name);

class VariantConformance : public SelectorConformance {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(VariantConformance);
INSTANTIATE_TEST_SUITE_P(All, VariantConformance,
                         ::testing::ValuesIn(selectors_that([](const Variant& variant) {
                           return variant.variant != "ref";
                         })),
                         test_name);

class EvictConformance : public SelectorConformance {};
INSTANTIATE_TEST_SUITE_P(All, EvictConformance,
                         ::testing::ValuesIn(selectors_that([](const Variant& variant) {
                           return variant.selector().evict != nullptr;
                         })),
                         test_name);

// The variant's options with this budget, where it has one.
Choices with_budget(const Variant& variant, Choices choices, const char* budget) {
  if (has_option(variant, "budget")) choices.emplace_back("budget", budget);
  return choices;
}

// Runs body(filled, c) on a cache for each case x key layout.
template <typename Body>
void for_each_cache(const std::vector<Case>& cases, const std::vector<CodecChoice>& layouts,
                    Body&& body, Pattern pattern = Pattern::kGaussian) {
  for (const Case& c : cases) {
    for (const CodecChoice& keys : layouts) {
      SCOPED_TRACE(describe(keys) + ", " + describe(c));
      auto key_codec = try_codec(SIKV_KEY_CODEC, keys, shape_of(c));
      if (!key_codec) continue;
      FilledCache filled(c.cache, std::move(*key_codec),
                         make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape_of(c)), pattern);
      body(filled, c);
      if (::testing::Test::HasFailure()) return;
    }
  }
}

// Two steps of each of `options` on each cache that the variant reads; how many it read.
int run_two_steps(const Variant& variant, const std::vector<Choices>& options,
                  const std::vector<Case>& cases, const std::vector<CodecChoice>& layouts) {
  int sessions = 0;
  for_each_cache(cases, layouts, [&](const FilledCache& filled, const Case& c) {
    for (const Choices& choices : options) {
      SCOPED_TRACE(describe(variant.id, choices));
      SelectorSession session(variant, choices, filled, c.group);
      if (!session.accepted()) continue;
      ++sessions;
      session.observe_everything();
      session.select(0);
      session.select(1);
    }
  });
  return sessions;
}

TEST_P(SelectorConformance, KeepsTheContractOnAwkwardShapes) {
  std::vector<Choices> options;
  for (const char* budget : {"0", "1", "7", "96", "0.25"}) {
    options.push_back(with_budget(*GetParam(), {}, budget));
  }
  EXPECT_GT(run_two_steps(*GetParam(), options, awkward_cases(), default_layouts(SIKV_KEY_CODEC)),
            0)
      << "reads no layout of any codec";
}

TEST_P(SelectorConformance, KeepsTheContractOnEveryLayout) {
  run_two_steps(*GetParam(), {with_budget(*GetParam(), {}, "33")}, {awkward_cases()[3]},
                all_layouts(SIKV_KEY_CODEC));
}

TEST_P(SelectorConformance, KeepsTheContractWithEveryOption) {
  std::vector<Choices> options;
  for (const Choices& choices : all_choices(*GetParam())) {
    options.push_back(with_budget(*GetParam(), choices, "33"));
  }
  run_two_steps(*GetParam(), options, {awkward_cases()[1], awkward_cases()[7]},
                default_layouts(SIKV_KEY_CODEC));
}

TEST_P(SelectorConformance, KeepsTheContractOnRandomCases) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const std::string budget = std::to_string(Random(seed).below(300));
    run_two_steps(*GetParam(), {with_budget(*GetParam(), {}, budget.c_str())}, {random_case(seed)},
                  default_layouts(SIKV_KEY_CODEC));
  }
}

TEST_P(SelectorConformance, AnswersTheSameAgainAndWithMoreThreads) {
  const Choices choices = with_budget(*GetParam(), {}, "33");
  for_each_cache(awkward_cases(), default_layouts(SIKV_KEY_CODEC),
                 [&](const FilledCache& filled, const Case& c) {
                   SelectorSession session(*GetParam(), choices, filled, c.group);
                   SelectorSession threaded(*GetParam(), choices, filled, c.group, 3);
                   if (!session.accepted()) return;
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

// A page that came in decode is as good as one of the prompt. Keys lie far from zero, where state
// that was not filled would show.
TEST_P(SelectorConformance, FollowsPagesThatComeInDecode) {
  const Case grown = make_case({512, 768, 256}, {1, 2, 3}, 16, 2, 3, 64, SIKV_FP16);
  const std::vector<int> prompt = {300, 515, 258};  // encoded: 256, 512, 256
  const Choices choices = with_budget(*GetParam(), {}, "40");
  const auto compare = [&](FilledCache& filled, const Case& c) {
    SelectorSession session(*GetParam(), choices, filled, c.group);
    if (!session.accepted()) return;
    const auto set_encoded = [&](const std::vector<int>& encoded) {
      for (int row = 0; row < filled.cache.num_rows(); ++row) {
        filled.cache.set_encoded_len(row, encoded[static_cast<size_t>(row / 2)]);
      }
    };
    set_encoded({256, 512, 256});
    session.observe(prompt);
    set_encoded(c.cache.encoded);
    session.observe_page({256, 512, -1});
    SelectorSession whole(*GetParam(), choices, filled, c.group);
    whole.observe_everything();
    EXPECT_EQ(session.select(0), whole.select(0));
  };
  for_each_cache({grown}, default_layouts(SIKV_KEY_CODEC), compare, Pattern::kOffset);
}

TEST_P(BudgetConformance, SelectsEverythingIfTheBudgetAllows) {
  for_each_cache(awkward_cases(), default_layouts(SIKV_KEY_CODEC),
                 [&](const FilledCache& filled, const Case& c) {
                   SelectorSession session(*GetParam(), {{"budget", "1000000"}}, filled, c.group);
                   if (!session.accepted()) return;
                   session.observe_everything();
                   const std::vector<Slots> rows = session.select(0);
                   for (int row = 0; row < filled.cache.num_rows(); ++row) {
                     EXPECT_EQ(rows[static_cast<size_t>(row)], candidates(filled.cache, row));
                   }
                 });
}

TEST_P(VariantConformance, MatchesTheReference) {
  const Variant& ref = find_variant(SIKV_SELECTOR, GetParam()->id, "ref");
  std::vector<Case> cases = awkward_cases();
  for (uint64_t seed = 100; seed < 108; ++seed) cases.push_back(random_case(seed));
  for_each_cache(cases, default_layouts(SIKV_KEY_CODEC),
                 [&](const FilledCache& filled, const Case& c) {
                   for (const Choices& options : all_choices(*GetParam())) {
                     SCOPED_TRACE(describe(GetParam()->id, options));
                     const Choices choices = with_budget(*GetParam(), options, "48");
                     SelectorSession session(*GetParam(), choices, filled, c.group),
                         reference(ref, choices, filled, c.group);
                     ASSERT_EQ(session.accepted(), reference.accepted());
                     if (!session.accepted()) continue;
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
                       // all of them: it swaps one pair at the cut at most.
                       EXPECT_GE(common.size() + 1, want[row].size());
                     }
                   }
                 });
}

TEST_P(EvictConformance, KeepListsAreListsOfSlots) {
  for (const char* budget : {"0", "3", "100"}) {
    Choices choices = with_budget(*GetParam(), {}, budget);
    if (has_option(*GetParam(), "evict")) choices.emplace_back("evict", "true");
    for_each_cache(
        awkward_cases(), default_layouts(SIKV_KEY_CODEC),
        [&](const FilledCache& filled, const Case& c) {
          SelectorSession session(*GetParam(), choices, filled, c.group);
          if (!session.accepted()) return;
          session.observe_everything();
          const sikv_cache_view& view = filled.cache.view();
          const auto rows = static_cast<size_t>(filled.cache.num_rows());
          const auto stride = static_cast<size_t>(view.max_encoded_len);
          Guarded<int32_t> keep(rows * stride), counts(rows);
          session.selector().evict({sizeof(sikv_evict_args), 0, &view, keep.data(), counts.data()},
                                   nullptr, nullptr);
          EXPECT_TRUE(keep.intact() && counts.intact()) << "written outside of the keep-lists";
          for (size_t row = 0; row < rows; ++row) {
            if (counts[row] == SIKV_SELECT_ALL) continue;
            ASSERT_GE(counts[row], 0);
            ASSERT_LE(counts[row], view.encoded_len[row]);
            const int32_t* list = keep.data() + row * stride;
            for (int i = 0; i < counts[row]; ++i) {
              EXPECT_GE(list[i], i == 0 ? 0 : list[i - 1] + 1);
              EXPECT_LT(list[i], view.encoded_len[row]);
            }
          }
        });
  }
}

}  // namespace
}  // namespace sikv::testing
