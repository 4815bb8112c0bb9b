#include "plugins/sdk/select.h"

#include <gtest/gtest.h>

#include <limits>

namespace sikv {
namespace {

using Slots = std::vector<int32_t>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Slots select(const std::vector<float>& scores, const Slots& pinned, int64_t budget,
             int32_t capacity = 64) {
  Slots slots(static_cast<size_t>(capacity), -7);
  int32_t count = -7;
  SelectionRow row({slots.data(), &count, capacity, 0}, 0);
  select_top(scores, pinned, budget, row);
  slots.resize(static_cast<size_t>(count));
  return slots;
}

TEST(SelectTopTest, TakesTheBestInAscendingOrder) {
  EXPECT_EQ(select({1, 5, 3, 4, 2}, {}, 3), Slots({1, 2, 3}));
  EXPECT_EQ(select({1, 5, 3, 4, 2}, {1, 3}, 2), Slots({2, 4}));
}

TEST(SelectTopTest, TakesNothingOrEverything) {
  EXPECT_EQ(select({1, 2, 3}, {1}, 0), Slots());
  EXPECT_EQ(select({1, 2, 3}, {1}, 2), Slots({0, 2}));
  EXPECT_EQ(select({1, 2, 3}, {1}, 1000), Slots({0, 2}));
  EXPECT_EQ(select({1, 2, 3}, {0, 1, 2}, 2), Slots());
  EXPECT_EQ(select({}, {}, 2), Slots());
}

TEST(SelectTopTest, BreaksTiesTowardsTheLowerSlot) {
  EXPECT_EQ(select({2, 2, 2, 2}, {0}, 2), Slots({1, 2}));
  EXPECT_EQ(select({1, 2, 3, 2, 2}, {}, 3), Slots({1, 2, 3}));
  EXPECT_EQ(select({-0.0f, 0.0f, -0.0f}, {}, 1), Slots({0}));
}

TEST(SelectTopTest, TakesInfiniteScoresAsAnyOther) {
  EXPECT_EQ(select({-kInfinity, -1e38f, kInfinity, -kInfinity}, {}, 2), Slots({1, 2}));
  EXPECT_EQ(select({-kInfinity, -1e38f, kInfinity, -kInfinity}, {}, 3), Slots({0, 1, 2}));
}

TEST(SelectTopTest, RefusesNaNUnlessItIsPinned) {
  EXPECT_THROW(select({1, NAN, 3}, {}, 1), PluginBug);
  EXPECT_THROW(select({1, NAN, 3}, {}, 3), PluginBug);
  EXPECT_EQ(select({1, NAN, 3}, {1}, 1), Slots({2}));
}

TEST(SelectTopTest, RefusesToOutgrowTheSelection) {
  EXPECT_THROW(select({1, 2, 3}, {}, 3, 2), PluginBug);
}

// fp32 would find these equal.
TEST(SelectTopTest, RanksDoublesAsDoubles) {
  Slots slots(1);
  int32_t count = 0;
  SelectionRow row({slots.data(), &count, 1, 0}, 0);
  const std::vector<double> scores = {1.0, 1.0 + 1e-12};
  select_top(scores, {}, 1, row);
  EXPECT_EQ(slots[0], 1);
}

TEST(SelectionCapacityTest, IsBoundedByTheLongestSequence) {
  sikv_shape shape{};
  shape.max_tokens = 1000;
  EXPECT_EQ(selection_capacity({96, 0.0}, shape), 96);
  EXPECT_EQ(selection_capacity({int64_t{1} << 40, 0.0}, shape), 1000);
  EXPECT_EQ(selection_capacity({-1, 0.0125}, shape), 12);
}

TEST(GroupMeanTest, AveragesHeads) {
  const std::vector<float> q = {1, 2, 3, 4, 5, 9};
  float mean[2];
  group_mean(q.data(), 3, 2, mean);
  EXPECT_EQ(mean[0], 3.0f);
  EXPECT_EQ(mean[1], 5.0f);
}

}  // namespace
}  // namespace sikv
