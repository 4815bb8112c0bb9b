// Every selector x variant x key layout against the contract of sikv_selector.h.

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "plugins/abi/sikv_limits.h"
#include "tests/conformance/cases.h"
#include "tests/support/ranking.h"
#include "tests/support/scored_selector.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

bool has_option(std::string_view id, std::string_view name) {
  const auto options = registry().options(SIKV_SELECTOR, id);
  return std::any_of(options.begin(), options.end(),
                     [&](const sikv_option_spec& spec) { return spec.name == name; });
}

template <typename Predicate>
std::vector<Subject> selectors_that(Predicate&& predicate) {
  std::vector<Subject> all = subjects(SIKV_SELECTOR);
  std::erase_if(all, [&](const Subject& subject) { return !predicate(subject); });
  return all;
}

class SelectorConformance : public VariantTest {};
INSTANTIATE_TEST_SUITE_P(All, SelectorConformance, ::testing::ValuesIn(subjects(SIKV_SELECTOR)),
                         test_name);

class BudgetConformance : public VariantTest {};
INSTANTIATE_TEST_SUITE_P(All, BudgetConformance,
                         ::testing::ValuesIn(selectors_that([](const Subject& subject) {
                           return has_option(subject.id, "budget");
                         })),
                         test_name);

class VariantConformance : public VariantTest {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(VariantConformance);
INSTANTIATE_TEST_SUITE_P(All, VariantConformance,
                         ::testing::ValuesIn(selectors_that([](const Subject& subject) {
                           return subject.variant != "ref";
                         })),
                         test_name);

class EvictConformance : public VariantTest {};
INSTANTIATE_TEST_SUITE_P(All, EvictConformance,
                         ::testing::ValuesIn(selectors_that([](const Subject& subject) {
                           return find_variant(SIKV_SELECTOR, subject.id).selector().evict !=
                                  nullptr;
                         })),
                         test_name);

// The variant's options with this budget, where it or what it wraps has one.
Choices with_budget(const Variant& variant, Choices choices, const char* budget) {
  std::string name = "budget", id = variant.id;
  while (!has_option(id, "budget")) {
    if (!has_option(id, "base")) return choices;
    id = own_choices(find_variant(SIKV_SELECTOR, id), {}).back().second;
    name = "base." + name;
  }
  choices.emplace_back(name, budget);
  return choices;
}

// Where all that is left is selected, what is left tells selectors apart. Empty for those that keep
// everything.
std::vector<Slots> keep_lists(SelectorSession& session, const FilledCache& filled) {
  SelectorInstance& selector = session.selector();
  if (!selector.evicts() || selector.variant().device != SIKV_CPU) return {};
  return evictions(selector, filled.cache);
}

// Every combination of named values; where candidates are kept from step to step, that too.
std::vector<Choices> all_modes(const Variant& variant) {
  std::vector<Choices> modes = all_choices(variant);
  if (has_option(variant.id, "scan_every")) {
    modes.push_back({{"rerank", "4"}, {"scan_every", "4"}});
    modes.push_back({{"rerank", "4"}, {"scan_every", "4"}, {"stagger", "true"}});
  }
  return modes;
}

// Whether nobody reads the planes of these keys: of the kernels only the one that decodes every
// layout takes them, and selectors share their readers.
bool is_only_decoded(const sikv_layout& keys, const sikv_shape& shape) {
  const sikv_layout values = make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape).describe();
  const auto ids = registry().ids(SIKV_KERNEL);
  return 1 >= std::count_if(ids.begin(), ids.end(), [&](const std::string& id) {
           const Variant& kernel = find_variant(SIKV_KERNEL, id);
           return make_instance<KernelInstance>(kernel, {}, shape).refusal(keys, values).empty();
         });
}

// AddressSanitizer takes ten times as long, for faults that hardly one layout has to itself: there
// every selector gets a third of the caches, not all the same ones.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kCachesApart = 3;
#else
constexpr size_t kCachesApart = 1;
#endif

// Runs body(filled, c) on a cache for each case x key layout; for a CUDA variant only layouts whose
// codec has one too.
template <typename Body>
void for_each_cache(const Variant& variant, const std::vector<Case>& cases,
                    const std::vector<CodecChoice>& layouts, Body&& body,
                    Pattern pattern = Pattern::kGaussian) {
  const bool dear = (variant.selector().flags & SIKV_SELECTOR_NEEDS_ALL_QUERIES) != 0;
  size_t turn = std::hash<std::string>()(variant.id) % 12;
  for (const Case& c : cases) {
    ++turn;
    const ExactRows rows(c.cache, pattern);
    for (size_t i = 0; i < layouts.size(); ++i) {
      if ((turn + i) % kCachesApart != 0) continue;
      const CodecChoice& keys = layouts[i];
      SCOPED_TRACE(describe(keys) + ", " + describe(c));
      auto key_codec = try_codec(SIKV_KEY_CODEC, keys, shape_of(c));
      if (!key_codec) continue;
      // Selectors reach some codecs through decode alone, and some look at nothing but exact keys for
      // minutes: of those layouts a case gets one in four.
      const bool one_in_four =
          is_only_decoded(key_codec->describe(), shape_of(c)) || (dear && keys.id != "fp16");
      if (cases.size() > 1 && one_in_four && (turn + i) % 4 != 0) continue;
      FilledCache filled(c.cache, rows, std::move(*key_codec),
                         make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape_of(c)));
      if (variant.device == SIKV_CUDA && !filled.attach_gpu_codecs(keys.choices, {}, shape_of(c))) {
        continue;
      }
      body(filled, c);
      if (::testing::Test::HasFailure()) return;
    }
  }
}

// Two steps of each of `options`, or of so many in turn, on each cache that the variant reads; how
// many it read.
int run_two_steps(const Variant& variant, const std::vector<Choices>& options,
                  const std::vector<Case>& cases, const std::vector<CodecChoice>& layouts,
                  size_t options_per_cache = SIZE_MAX) {
  int sessions = 0;
  size_t turn = 0;
  for_each_cache(variant, cases, layouts, [&](const FilledCache& filled, const Case& c) {
    for (size_t i = 0; i < std::min(options.size(), options_per_cache); ++i) {
      const Choices& choices = options[turn++ % options.size()];
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
    options.push_back(with_budget(variant(), {}, budget));
  }
  // Each budget meets two fifths of the cases and layouts.
  EXPECT_GT(run_two_steps(variant(), options, awkward_cases(), default_layouts(SIKV_KEY_CODEC), 2),
            0)
      << "reads no layout of any codec";
}

TEST_P(SelectorConformance, KeepsTheContractOnEveryLayout) {
  run_two_steps(variant(), {with_budget(variant(), {}, "33")}, {awkward_cases()[3]},
                all_layouts(SIKV_KEY_CODEC));
}

TEST_P(SelectorConformance, KeepsTheContractWithEveryOption) {
  std::vector<Choices> options;
  for (const Choices& choices : all_choices(variant())) {
    options.push_back(with_budget(variant(), choices, "33"));
  }
  run_two_steps(variant(), options, {awkward_cases()[1], awkward_cases()[7]},
                default_layouts(SIKV_KEY_CODEC));
}

TEST_P(SelectorConformance, KeepsTheContractOnRandomCases) {
  uint64_t seed = 0;
  for (const char* budget : {"5", "80", "290"}) {
    std::vector<Case> cases;
    while (cases.size() < 4) cases.push_back(random_case(seed++));
    run_two_steps(variant(), {with_budget(variant(), {}, budget)}, cases,
                  default_layouts(SIKV_KEY_CODEC));
  }
}

TEST_P(SelectorConformance, AnswersTheSameAgainAndWithMoreThreads) {
  std::vector<Choices> options = {{}};
  if (has_option(variant().id, "scan_every")) options.push_back(all_modes(variant()).back());
  for_each_cache(variant(), awkward_cases(), default_layouts(SIKV_KEY_CODEC),
                 [&](const FilledCache& filled, const Case& c) {
                   for (const Choices& mode : options) {
                     SCOPED_TRACE(describe(variant().id, mode));
                     const Choices choices = with_budget(variant(), mode, "33");
                     SelectorSession session(variant(), choices, filled, c.group);
                     SelectorSession threaded(variant(), choices, filled, c.group, 3);
                     if (!session.accepted()) return;
                     session.observe_everything();
                     threaded.observe_everything();
                     const std::vector<Slots> kept = keep_lists(session, filled);
                     EXPECT_EQ(keep_lists(threaded, filled), kept);
                     const std::vector<Slots> first = session.select(0);
                     EXPECT_EQ(threaded.select(0), first);
                     EXPECT_EQ(threaded.select(1), session.select(1));
                     EXPECT_EQ(threaded.select(2), session.select(2));
                     // A sequence that starts anew knows nothing of what was before.
                     session.observe_everything();
                     EXPECT_EQ(keep_lists(session, filled), kept);
                     EXPECT_EQ(session.select(0), first);
                   }
                 });
}

// No option asks for more prompt queries than a selector gets.
TEST_P(SelectorConformance, WindowsAreOfQueriesThatAreGiven) {
  for (const sikv_option_spec& option : variant().options) {
    if (std::string_view(option.name) == "window") {
      EXPECT_LE(option.max, SIKV_PROMPT_QUERIES);
    }
  }
}

// A page that came in decode is as good as one of the prompt. Keys lie far from zero, where state
// that was not filled would show.
TEST_P(SelectorConformance, FollowsPagesThatComeInDecode) {
  const Case grown = make_case({512, 768, 256}, {1, 2, 3}, 16, 2, 3, 64, SIKV_FP16);
  const std::vector<int> prompt = {300, 515, 258};  // encoded: 256, 512, 256
  Choices choices = with_budget(variant(), {}, "40");
  // What is fitted on the prompt differs with it, unless it is fitted on what both begin with.
  if (has_option(variant().id, "fit_tokens")) choices.emplace_back("fit_tokens", "256");
  const auto compare = [&](FilledCache& filled, const Case& c) {
    SelectorSession session(variant(), choices, filled, c.group);
    if (!session.accepted()) return;
    const auto set_encoded = [&](const std::vector<int>& encoded) {
      for (int row = 0; row < filled.cache.num_rows(); ++row) {
        filled.cache.set_encoded_len(row, encoded[static_cast<size_t>(row / 2)]);
      }
    };
    SelectorSession threaded(variant(), choices, filled, c.group, 3);
    for (SelectorSession* grows : {&session, &threaded}) {
      set_encoded({256, 512, 256});
      grows->observe(prompt);
      set_encoded(c.cache.encoded);
      grows->observe_page({256, 512, -1});
    }
    SelectorSession whole(variant(), choices, filled, c.group);
    whole.observe_everything();
    // Who evicts ranks by queries, and those of a longer prompt are others.
    EXPECT_EQ(keep_lists(session, filled), keep_lists(threaded, filled));
    EXPECT_EQ(session.select(0), whole.select(0));
  };
  for_each_cache(variant(), {grown}, default_layouts(SIKV_KEY_CODEC), compare, Pattern::kOffset);
}

TEST_P(BudgetConformance, SelectsEverythingIfTheBudgetAllows) {
  for_each_cache(variant(), awkward_cases(), default_layouts(SIKV_KEY_CODEC),
                 [&](const FilledCache& filled, const Case& c) {
                   SelectorSession session(variant(), {{"budget", "1000000"}}, filled, c.group);
                   if (!session.accepted()) return;
                   session.observe_everything();
                   const std::vector<Slots> rows = session.select(0);
                   for (int row = 0; row < filled.cache.num_rows(); ++row) {
                     EXPECT_EQ(rows[static_cast<size_t>(row)], candidates(filled.cache, row));
                   }
                 });
}

// body(filled, c, session, reference) for the variant and `ref`, both of which have seen the prompt,
// in every mode.
template <typename Body>
void for_each_pair(const Variant& variant, const std::vector<Case>& cases, const char* budget,
                   Body&& body, Pattern pattern = Pattern::kGaussian) {
  const Variant& ref = find_variant(SIKV_SELECTOR, variant.id, "ref");
  for_each_cache(
      variant, cases, default_layouts(SIKV_KEY_CODEC),
      [&](const FilledCache& filled, const Case& c) {
        for (const Choices& mode : all_modes(variant)) {
          SCOPED_TRACE(describe(variant.id, mode));
          const Choices choices = with_budget(variant, mode, budget);
          SelectorSession session(variant, choices, filled, c.group),
              reference(ref, choices, filled, c.group);
          ASSERT_EQ(session.accepted(), reference.accepted());
          if (!session.accepted()) continue;
          session.observe_everything();
          reference.observe_everything();
          body(filled, c, session, reference);
        }
      },
      pattern);
}

TEST_P(VariantConformance, MatchesTheReference) {
  std::vector<Case> cases = awkward_cases();
  for (uint64_t seed = 100; seed < 108; ++seed) cases.push_back(random_case(seed));
  for_each_pair(variant(), cases, "48",
                [&](const FilledCache& filled, const Case&, SelectorSession& session,
                    SelectorSession& reference) {
                  if (variant().device == SIKV_CPU) {
                    expect_equal_but_for_the_cut(keep_lists(session, filled),
                                                 keep_lists(reference, filled));
                  }
                  for (int step = 0; step < 3; ++step) {
                    SCOPED_TRACE("step " + std::to_string(step));
                    expect_equal_but_for_the_cut(session.select(step), reference.select(step));
                  }
                });
}

std::vector<Case> cases_of_each_type() {
  return {make_case({300, 31}, {20, 1}, 7, 2, 4, 128, SIKV_BF16),
          make_case({257}, {1}, 0, 2, 1, 256, SIKV_FP32),
          make_case({300, 33}, {5, 0}, 3, 1, 8, 64, SIKV_FP16)};
}

// Queries as large as a cache takes: of even rows with the signs of the row's last encoded key, of
// odd rows against them, so that scores are as large and as low as they get: 256 * 2^58 * 2^58 is
// finite in fp32. Sizes differ, or scores of kHuge would nearly be ties.
std::vector<uint8_t> largest_queries(const FilledCache& filled, const Case& c) {
  const float largest = c.cache.dtype == SIKV_FP16 ? 65504.0f : SIKV_LARGEST_ELEMENT;
  std::vector<float> q;
  Random random(17);
  for (int row = 0; row < filled.cache.num_rows(); ++row) {
    const int last = std::max(filled.cache.view().encoded_len[row] - 1, 0);
    const std::vector<float> key = key_of(filled, row, last);
    for (int g = 0; g < c.group; ++g) {
      for (const float k : key) {
        const float size = largest * static_cast<float>(1.0 - 0.5 * random.uniform());
        q.push_back(std::copysign(size, row % 2 == 0 ? k : -k));
      }
    }
  }
  return to_dtype(q, c.cache.dtype);
}

// Larger ones the framework refuses, and so do selectors that look.
TEST_P(VariantConformance, MatchesTheReferenceOnTheLargestNumbers) {
  for_each_pair(
      variant(), cases_of_each_type(), "33",
      [&](const FilledCache& filled, const Case& c, SelectorSession& session,
          SelectorSession& reference) {
        const std::vector<uint8_t> q = largest_queries(filled, c);
        expect_equal_but_for_the_cut(session.select(0, q), reference.select(0, q));
      },
      Pattern::kHuge);
}

// All scores are one. Without a budget of its own a selector cuts where probabilities add up to
// some mass, which is a matter of rounding; zeros, of both signs, are exact.
TEST_P(VariantConformance, BreaksTiesAsTheReferenceDoes) {
  for (const Pattern pattern : {Pattern::kZeros, Pattern::kConstant}) {
    if (pattern == Pattern::kConstant && !has_option(variant().id, "budget")) continue;
    SCOPED_TRACE(pattern_name(pattern));
    for_each_pair(
        variant(), cases_of_each_type(), "33",
        [&](const FilledCache&, const Case&, SelectorSession& session, SelectorSession& reference) {
          EXPECT_EQ(session.select(0), reference.select(0));
        },
        pattern);
  }
}

TEST_P(EvictConformance, KeepListsAreListsOfSlots) {
  for (const char* budget : {"0", "3", "100"}) {
    Choices choices = with_budget(variant(), {}, budget);
    if (has_option(variant().id, "evict")) choices.emplace_back("evict", "true");
    for_each_cache(
        variant(), awkward_cases(), default_layouts(SIKV_KEY_CODEC),
        [&](const FilledCache& filled, const Case& c) {
          SelectorSession session(variant(), choices, filled, c.group);
          if (!session.accepted()) return;
          // A wrapper's base may keep everything.
          if (!session.selector().evicts()) return;
          session.observe_everything();
          const sikv_cache_view& view = filled.cache.view();
          const auto rows = static_cast<size_t>(filled.cache.num_rows());
          const auto stride = static_cast<size_t>(view.max_encoded_len);
          if (session.selector().scores() && variant().device == SIKV_CPU) {
            Guarded<float> scores(rows * stride);
            std::fill_n(scores.data(), scores.size(), std::nanf(""));
            session.selector().score({sizeof(sikv_score_args), 0, &view, scores.data()},
                                     session.workspace().data(), nullptr);
            EXPECT_TRUE(scores.intact());
            for (size_t row = 0; row < rows; ++row) {
              for (int slot = 0; slot < view.encoded_len[row]; ++slot) {
                const float score = scores.data()[row * stride + static_cast<size_t>(slot)];
                EXPECT_TRUE(std::isfinite(score) || score == HUGE_VALF) << score;
              }
            }
          }
          Guarded<int32_t> keep(rows * stride), counts(rows);
          DeviceCall call(device_of(variant()));
          session.selector().evict({sizeof(sikv_evict_args), 0, &call.view(filled.cache),
                                    call.out(keep), call.out(counts)},
                                   call.out(session.workspace()), call.stream());
          call.finish();
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
