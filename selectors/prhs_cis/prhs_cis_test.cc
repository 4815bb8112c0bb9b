#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/common/index_sharing.h"
#include "tests/support/ranking.h"

namespace sikv::testing {
namespace {

const Variant& cis() { return find_variant(SIKV_SELECTOR, "prhs_cis"); }

FilledCache make_cache(const CacheSpec& spec) {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
}

constexpr int kGroup = 3;
CacheSpec two_sequences() {
  return {.num_kv_heads = 2, .encoded = {300, 70}, .tail = {9, 40}, .pinned = 12};
}

SharingRule rule(int radius, double dilated, bool matched) {
  std::vector<sikv_option_value> values;
  for (const sikv_option_spec& spec : kSharingOptions) {
    values.push_back({spec.name, spec.type, 0, 0, 0.0, ""});
    const std::string_view name = spec.name;
    if (name == "radius") values.back().i = radius;
    if (name == "dilated") values.back().f = dilated;
    if (name == "matched") values.back().i = matched;
  }
  sikv_create_args args{};
  args.options = values.data();
  args.num_options = static_cast<uint32_t>(values.size());
  return SharingRule(Options(args));
}

// ---- dilation -----------------------------------------------------------------------------------

constexpr int32_t kPinned[] = {0, 1, 21};
constexpr SlotDomain kDomain{0, 100, kPinned};

TEST(DilateTest, AddsNeighboursOfTheBest) {
  // Of 6, two bring neighbours: 20 (not 21, which is pinned), and 99, the last one.
  EXPECT_EQ(dilate(Slots{20, 99, 50, 60, 19, 70}, rule(1, 0.34, false), kDomain),
            (Slots{19, 20, 50, 60, 70, 98, 99}));
  EXPECT_EQ(dilate(Slots{20, 99, 50, 60, 19, 70}, rule(2, 0.34, false), kDomain),
            (Slots{18, 19, 20, 22, 50, 60, 70, 97, 98, 99}));
}

TEST(DilateTest, TakesThePlaceOfTheLeastWhereBudgetsMatch) {
  EXPECT_EQ(dilate(Slots{20, 99, 50, 60, 30, 70}, rule(1, 0.34, true), kDomain),
            (Slots{19, 20, 50, 60, 98, 99}));
}

TEST(DilateTest, ChangesNothingWithoutNeighboursOrCentres) {
  for (const bool matched : {false, true}) {
    EXPECT_EQ(dilate(Slots{50, 20, 99}, rule(0, 1.0, matched), kDomain), (Slots{20, 50, 99}));
    EXPECT_EQ(dilate(Slots{50, 20, 99}, rule(5, 0.0, matched), kDomain), (Slots{20, 50, 99}));
  }
}

TEST(DilateTest, StaysInTheWindow) {
  EXPECT_EQ(dilate(Slots{40, 60}, rule(1, 1.0, false), SlotDomain{40, 61, {}}),
            (Slots{40, 41, 59, 60}));
}

// ---- sharing ------------------------------------------------------------------------------------

TEST(PrhsCisTest, NeverSharingIsTheOracleAtEveryStep) {
  const FilledCache filled = make_cache(two_sequences());
  SelectorSession session(cis(), {{"budget", "25"}, {"tau", "1.5"}}, filled, kGroup),
      oracle(find_variant(SIKV_SELECTOR, "oracle"), {{"budget", "25"}}, filled, kGroup);
  session.observe_everything();
  oracle.observe_everything();
  for (int step = 0; step < 5; ++step) {
    // The same query again must not be taken over either.
    expect_equal_but_for_the_cut(session.select(step / 2), oracle.select(step / 2));
  }
  EXPECT_EQ(counters_of(session).at("reused"), 0);
}

TEST(PrhsCisTest, AlwaysSharingFollowsTheBlocksAlone) {
  const FilledCache filled = make_cache(two_sequences());
  SelectorSession session(cis(), {{"budget", "25"}, {"tau", "-2"}, {"block", "4"}, {"radius", "0"}},
                          filled, kGroup);
  session.observe_everything();
  std::vector<Slots> anchor;
  for (int step = 0; step < 12; ++step) {
    const std::vector<Slots> rows = session.select(step);
    if (step % 4 == 0) {
      EXPECT_NE(rows, anchor) << step;
      anchor = rows;
    }
    EXPECT_EQ(rows, anchor) << step;
  }
  EXPECT_EQ(counters_of(session).at("reused"), 4 * 9);
  EXPECT_EQ(counters_of(session).at("runs"), 4 * 12);
  EXPECT_EQ(counters_of(session).at("scan_bytes"), 3 * 2 * (309 + 110) * 128.0);
}

// q plus noise on one query head.
std::vector<uint8_t> disturbed(const CacheSpec& spec, const std::vector<uint8_t>& q, int head) {
  const std::vector<uint8_t> noise = gaussian_queries(spec, kGroup, 1, 999);
  std::vector<uint8_t> out = q;
  const auto bytes = static_cast<size_t>(spec.head_dim * sikv_dtype_bytes(spec.dtype));
  const auto at = static_cast<ptrdiff_t>(static_cast<size_t>(head) * bytes);
  std::copy_n(noise.begin() + at, bytes, out.begin() + at);
  return out;
}

TEST(PrhsCisTest, OneHeadThatTurnsAwayMakesItsRowSearch) {
  const CacheSpec spec = two_sequences();
  const FilledCache filled = make_cache(spec);
  const std::vector<uint8_t> q = gaussian_queries(spec, kGroup, 1, 5);
  for (const char* reanchor : {"false", "true"}) {
    SelectorSession session(cis(), {{"budget", "25"}, {"reanchor", reanchor}}, filled, kGroup);
    session.observe_everything();
    session.select(0, q);
    EXPECT_EQ(counters_of(session).at("reused"), 0);
    session.select(1, q);
    EXPECT_EQ(counters_of(session).at("reused"), 4);
    // Head 4 belongs to row 1 (sequence 0, KV head 1).
    const std::vector<uint8_t> turned = disturbed(spec, q, 4);
    session.select(2, turned);
    EXPECT_EQ(counters_of(session).at("reused"), 4 + 3);
    session.select(3, turned);
    EXPECT_EQ(counters_of(session).at("reused"), 4 + 3 + (std::string(reanchor) == "true" ? 4 : 3));
  }
}

// What the anchor chose is kept but for the places that neighbours took.
TEST(PrhsCisTest, FollowersGetTheDilatedListOfTheAnchor) {
  const CacheSpec spec = two_sequences();
  const FilledCache filled = make_cache(spec);
  const std::vector<uint8_t> q = gaussian_queries(spec, kGroup, 1, 5);
  SelectorSession session(cis(), {{"budget", "30"}}, filled, kGroup);
  session.observe_everything();
  const std::vector<Slots> anchor = session.select(0, q), follower = session.select(1, q);
  for (size_t row = 0; row < anchor.size(); ++row) {
    EXPECT_EQ(follower[row].size(), anchor[row].size());
    Slots common;
    std::set_intersection(anchor[row].begin(), anchor[row].end(), follower[row].begin(),
                          follower[row].end(), std::back_inserter(common));
    EXPECT_GE(common.size(), 30u - 20u);
    EXPECT_LT(common.size(), 30u);
  }
}

// ---- a whole run, against the definition in fp64 and without the plugin's code ---------------------

// A group's queries [G, D] of one row: those of `q` turned so far that each head's cosine with before
// is `cosines[g]`.
std::vector<float> turned(const FilledCache& filled, const std::vector<uint8_t>& q, int row,
                          const std::vector<double>& cosines, Random& random) {
  std::vector<float> out;
  for (int g = 0; g < kGroup; ++g) {
    const std::vector<float> x = query_of(filled, q, row, kGroup, g);
    std::vector<float> aside(x.size());
    for (float& a : aside) a = static_cast<float>(random.normal());
    const double along = dot(aside, x) / dot(x, x);
    for (size_t d = 0; d < x.size(); ++d) aside[d] -= static_cast<float>(along) * x[d];
    const double cosine = cosines[static_cast<size_t>(g)],
                 sine = std::sqrt((1 - cosine * cosine) * dot(x, x) / dot(aside, aside));
    for (size_t d = 0; d < x.size(); ++d) {
      out.push_back(static_cast<float>(cosine * x[d] + sine * aside[d]));
    }
  }
  return out;
}

// The queries of all rows, each head at that cosine to those of `q`; of one row its last head at
// another.
std::vector<uint8_t> turned(const FilledCache& filled, const std::vector<uint8_t>& q, double cosine,
                            uint64_t seed, int other_row = -1, double other = 0) {
  Random random(seed);
  std::vector<float> all;
  for (int row = 0; row < filled.cache.num_rows(); ++row) {
    const std::vector<float> group =
        turned(filled, q, row, {cosine, cosine, row == other_row ? other : cosine}, random);
    all.insert(all.end(), group.begin(), group.end());
  }
  return to_dtype(all, filled.cache.view().dtype);
}

// Unpinned slots of a row, best first: by the mean over the heads of their softmaxes.
Slots ranked(const FilledCache& filled, int row, const std::vector<uint8_t>& q) {
  const CacheSpec& spec = filled.cache.spec();
  const auto b = static_cast<size_t>(row / spec.num_kv_heads);
  const int tokens = spec.encoded[b] + spec.tail[b];
  std::vector<double> mean(static_cast<size_t>(tokens), 0.0);
  for (int g = 0; g < kGroup; ++g) {
    const std::vector<float> x = query_of(filled, q, row, kGroup, g);
    std::vector<double> e;
    for (int t = 0; t < tokens; ++t) {
      e.push_back(std::exp(dot(x, key_of(filled, row, t)) / std::sqrt(spec.head_dim)));
    }
    const double sum = std::accumulate(e.begin(), e.end(), 0.0);
    for (size_t t = 0; t < e.size(); ++t) mean[t] += e[t] / sum;
  }
  Slots slots = candidates(filled.cache, row);
  std::stable_sort(slots.begin(), slots.end(), [&](int32_t a, int32_t c) {
    return mean[static_cast<size_t>(a)] > mean[static_cast<size_t>(c)];
  });
  return slots;
}

constexpr int kBudget = 25, kCentres = 8;  // a third, rounded down

Slots searched(const FilledCache& filled, int row, const std::vector<uint8_t>& q) {
  Slots slots = ranked(filled, row, q);
  slots.resize(kBudget);
  std::sort(slots.begin(), slots.end());
  return slots;
}

// What followers of an anchor with these queries take over: with both neighbours of the best, which
// come on top, or, matched, in the places of the least.
Slots followed(const FilledCache& filled, int row, const std::vector<uint8_t>& q, bool matched) {
  const Slots order = ranked(filled, row, q), open = candidates(filled.cache, row);
  Slots slots;
  const auto take = [&](int32_t slot) {
    if (!std::binary_search(open.begin(), open.end(), slot)) return;
    if (matched && slots.size() == kBudget) return;
    if (std::find(slots.begin(), slots.end(), slot) == slots.end()) slots.push_back(slot);
  };
  for (size_t i = 0; i < kBudget; ++i) {
    take(order[i]);
    if (i < kCentres) take(order[i] - 1), take(order[i] + 1);
  }
  std::sort(slots.begin(), slots.end());
  return slots;
}

// Row 1 turns away in one of its heads and must search; the others, at a cosine above tau, must not.
TEST(PrhsCisTest, RowsFollowOrSearchByTheirOwnQueries) {
  const CacheSpec spec = two_sequences();
  const FilledCache filled = make_cache(spec);
  const std::vector<uint8_t> q = gaussian_queries(spec, kGroup, 1, 5);
  for (const auto& [variant, matched, reanchor] : {std::tuple("ref", false, false),
                                                   {"ref", false, true},
                                                   {"ref", true, false},
                                                   {"cpu", false, false},
                                                   {"cpu", false, true},
                                                   {"cpu", true, true}}) {
    SCOPED_TRACE(std::string(variant) + (matched ? " matched" : " on top") +
                 (reanchor ? " reanchored" : ""));
    SelectorSession session(find_variant(SIKV_SELECTOR, "prhs_cis", variant),
                            {{"budget", std::to_string(kBudget)},
                             {"matched", matched ? "true" : "false"},
                             {"reanchor", reanchor ? "true" : "false"},
                             {"block", "6"}},
                            filled, kGroup);
    session.exceeds_budget = !matched;
    session.observe_everything();
    double reused = 0, selected = 0, scan_bytes = 0;
    std::vector<std::vector<uint8_t>> anchor(4, q);  // of each row
    const auto step = [&](int64_t number, const std::vector<uint8_t>& now,
                          const std::vector<bool>& follows) {
      SCOPED_TRACE("step " + std::to_string(number));
      const std::vector<Slots> rows = session.select(number, now);
      for (int row = 0; row < 4; ++row) {
        const auto i = static_cast<size_t>(row);
        SCOPED_TRACE("row " + std::to_string(row));
        EXPECT_EQ(rows[i], follows[i] ? followed(filled, row, anchor[i], matched)
                                      : searched(filled, row, now));
        reused += follows[i];
        selected += static_cast<double>(rows[i].size());
        if (!follows[i]) scan_bytes += (row < 2 ? 309 : 110) * 128.0;
      }
      EXPECT_EQ(counters_of(session).at("reused"), reused);
      EXPECT_EQ(counters_of(session).at("selected"), selected);
      EXPECT_EQ(counters_of(session).at("scan_bytes"), scan_bytes);
    };
    const std::vector<bool> none(4, false), all(4, true), but_row_1 = {true, false, true, true};
    step(0, q, none);
    step(1, turned(filled, q, 0.85, 1), all);
    const std::vector<uint8_t> away = turned(filled, q, 0.85, 2, 1, 0.75);
    step(2, away, but_row_1);
    if (reanchor) anchor[1] = away;
    // As before the miss, or, where it became the anchor, by what it chose.
    step(3, away, reanchor ? all : but_row_1);
    step(4, q, reanchor ? but_row_1 : all);
    if (reanchor) anchor[1] = q;
    step(5, turned(filled, q, 0.79, 3), none);  // all turn away
    if (reanchor) anchor.assign(4, turned(filled, q, 0.79, 3));
    // A block ends for those whose anchor is of step 0, whatever the query.
    step(6, anchor[0], reanchor ? all : none);
    EXPECT_GT(reused, 0);
    EXPECT_EQ(selected > 28.0 * kBudget, !matched);  // of four rows in seven steps
  }
}

// Its tokens are in no list that was made before.
TEST(PrhsCisTest, ANewPageBeginsABlock) {
  const CacheSpec spec{.num_kv_heads = 1, .encoded = {512}, .tail = {1}, .pinned = 4};
  FilledCache filled = make_cache(spec);
  const std::vector<uint8_t> q = gaussian_queries(spec, kGroup, 1, 5);
  SelectorSession session(cis(), {{"budget", "40"}}, filled, kGroup);
  filled.cache.set_encoded_len(0, 256);
  session.observe({300});
  session.select(0, q);
  filled.cache.set_encoded_len(0, 512);
  session.observe_page({256});
  const std::vector<Slots> rows = session.select(1, q);
  EXPECT_EQ(counters_of(session).at("reused"), 0);
  EXPECT_GE(rows[0].back(), 256);
}

TEST(PrhsCisTest, AuditedBoundsHold) {
  const CacheSpec spec = two_sequences();
  const FilledCache filled = make_cache(spec);
  for (const char* budget : {"1", "25", "1000"}) {
    SelectorSession session(cis(),
                            {{"budget", budget}, {"tau", "-2"}, {"block", "8"}, {"audit", "true"}},
                            filled, kGroup);
    session.observe_everything();
    for (int step = 0; step < 16; ++step) session.select(step);
    EXPECT_EQ(counters_of(session).at("audited"), 4 * 14);
    EXPECT_EQ(counters_of(session).at("reused"), 4 * 14);
    EXPECT_EQ(counters_of(session).at("bound_violations"), 0);
    EXPECT_LE(counters_of(session).at("dropped"), counters_of(session).at("dropped_bound"));
    EXPECT_LE(counters_of(session).at("loss"), counters_of(session).at("loss_bound"));
    if (std::string(budget) == "25") {
      EXPECT_GT(counters_of(session).at("loss"), 0);  // queries that have nothing in common
    }
  }
}

TEST(PrhsCisTest, CountsWhatItRemembers) {
  const FilledCache filled = make_cache(two_sequences());
  SelectorSession session(cis(), {{"budget", "25"}, {"radius", "0"}}, filled, kGroup);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 0u);
  session.select(0);
  EXPECT_GE(session.selector().state_bytes(), 4u * (kGroup * 64 + 25) * 4);
  session.selector().begin_sequence(0);
  EXPECT_GE(session.selector().state_bytes(), 2u * (kGroup * 64 + 25) * 4);
}

}  // namespace
}  // namespace sikv::testing
