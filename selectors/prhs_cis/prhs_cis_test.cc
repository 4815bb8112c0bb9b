#include <gtest/gtest.h>

#include "kernels/common/index_sharing.h"
#include "tests/support/selector_session.h"

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

double counter(SelectorSession& session, std::string_view name) {
  for (const sikv_counter& c : session.selector().counters()) {
    if (name == c.name) return c.value;
  }
  ADD_FAILURE() << "no counter " << name;
  return 0;
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
  EXPECT_EQ(counter(session, "reused"), 0);
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
  EXPECT_EQ(counter(session, "reused"), 4 * 9);
  EXPECT_EQ(counter(session, "runs"), 4 * 12);
  EXPECT_EQ(counter(session, "scan_bytes"), 3 * 2 * (309 + 110) * 128.0);
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
    EXPECT_EQ(counter(session, "reused"), 0);
    session.select(1, q);
    EXPECT_EQ(counter(session, "reused"), 4);
    // Head 4 belongs to row 1 (sequence 0, KV head 1).
    const std::vector<uint8_t> turned = disturbed(spec, q, 4);
    session.select(2, turned);
    EXPECT_EQ(counter(session, "reused"), 4 + 3);
    session.select(3, turned);
    EXPECT_EQ(counter(session, "reused"), 4 + 3 + (std::string(reanchor) == "true" ? 4 : 3));
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
  EXPECT_EQ(counter(session, "reused"), 0);
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
    EXPECT_EQ(counter(session, "audited"), 4 * 14);
    EXPECT_EQ(counter(session, "reused"), 4 * 14);
    EXPECT_EQ(counter(session, "bound_violations"), 0);
    EXPECT_LE(counter(session, "dropped"), counter(session, "dropped_bound"));
    EXPECT_LE(counter(session, "loss"), counter(session, "loss_bound"));
    if (std::string(budget) == "25") {
      EXPECT_GT(counter(session, "loss"), 0);  // queries that have nothing in common
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
