#include <gtest/gtest.h>

#include "kernels/common/depth_windows.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

const Variant& psaw() { return find_variant(SIKV_SELECTOR, "prhs_psaw"); }

// A cache of `layers` layers, of which this is the last.
FilledCache last_of(int layers) {
  const CacheSpec spec{
      .num_kv_heads = 2, .encoded = {300, 70}, .tail = {9, 40}, .pinned = 12, .layer = layers - 1};
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
}

// The numbers of 4096 tokens and 32 layers, by hand.
TEST(DepthPrefixTest, FollowsItsFormula) {
  const DepthPrefix prefix(0.5, 32, 0.7, 1.0);
  EXPECT_EQ(prefix.tokens(0, 4096), 0);
  EXPECT_EQ(prefix.tokens(16, 4096), 0);
  EXPECT_EQ(prefix.tokens(20, 4096), 349);
  EXPECT_EQ(prefix.tokens(24, 4096), 669);
  EXPECT_EQ(prefix.tokens(28, 4096), 961);
  EXPECT_EQ(prefix.tokens(31, 4096), 1164);
}

TEST(DepthPrefixTest, NeverShrinksWithDepthOrLength) {
  for (const double base : {0.1, 0.7, 0.99}) {
    for (const double rate : {0.5, 1.0, 3.0}) {
      const DepthPrefix prefix(0.3, 10, base, rate);
      for (int layer = 0; layer < 9; ++layer) {
        for (int64_t t = 0; t < 300; ++t) {
          EXPECT_GE(prefix.tokens(layer + 1, t), prefix.tokens(layer, t));
          EXPECT_GE(prefix.tokens(layer, t + 1), prefix.tokens(layer, t));
          EXPECT_LE(prefix.tokens(layer, t), t);
        }
      }
    }
  }
}

TEST(DepthPrefixTest, IsEmptyWhereTheBaseOrTheRateSaysSo) {
  for (int layer = 0; layer < 32; ++layer) {
    EXPECT_EQ(DepthPrefix(0.0, 32, 1.0, 2.0).tokens(layer, 4096), 0);
    EXPECT_EQ(DepthPrefix(0.0, 32, 0.3, 0.0).tokens(layer, 4096), 0);
  }
}

TEST(PrhsPsawTest, SelectsFromThePrefixOn) {
  const FilledCache filled = last_of(4);
  SelectorSession session(psaw(), {{"phi", "0.5"}, {"first_layer", "0"}}, filled, 1);
  session.observe_everything();
  const std::vector<Slots> rows = session.select(0);
  for (int row = 0; row < filled.cache.num_rows(); ++row) {
    Slots want = candidates(filled.cache, row);
    const double length = row < 2 ? 309 : 110;
    const auto first = static_cast<int32_t>((1 - std::pow(0.5, 0.75)) * length);
    std::erase_if(want, [&](int32_t slot) { return slot < first; });
    EXPECT_EQ(rows[static_cast<size_t>(row)], want) << "row " << row;
  }
}

TEST(PrhsPsawTest, SelectsEverythingWithoutAWindow) {
  const FilledCache filled = last_of(4);
  for (const Choices& choices : {Choices{{"phi", "1"}}, Choices{{"alpha", "0"}}}) {
    SelectorSession session(psaw(), choices, filled, 1);
    session.observe_everything();
    const std::vector<Slots> rows = session.select(0);
    for (int row = 0; row < filled.cache.num_rows(); ++row) {
      EXPECT_EQ(rows[static_cast<size_t>(row)], candidates(filled.cache, row));
    }
  }
}

}  // namespace
}  // namespace sikv::testing
