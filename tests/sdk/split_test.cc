#include "plugins/sdk/split.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

namespace sikv {
namespace {

using Shares = std::vector<int64_t>;

TEST(SplitTest, RoundsTheLargestFractionsUp) {
  EXPECT_EQ(split_by_largest_remainder(std::vector<double>{1.2, 2.7, 3.1}, 7), (Shares{1, 3, 3}));
  EXPECT_EQ(split_by_largest_remainder(std::vector<double>{0.5, 0.5, 1.0}, 2), (Shares{1, 0, 1}));
  EXPECT_EQ(split_by_largest_remainder(std::vector<double>{4, 5}, 9), (Shares{4, 5}));
  EXPECT_EQ(split_by_largest_remainder(std::vector<double>{}, 0), Shares{});
}

// Sums of parts that are whole but for the last bit of a double stay whole.
TEST(SplitTest, IsExactForAnyParts) {
  for (int heads = 1; heads < 40; ++heads) {
    for (int total = 0; total < 200; total += 7) {
      std::vector<double> wanted;
      for (int h = 0; h < heads; ++h) wanted.push_back(0.2 * (total * 5.0) / heads);
      const Shares shares = split_by_largest_remainder(wanted, total);
      EXPECT_EQ(std::accumulate(shares.begin(), shares.end(), int64_t{0}), total);
      for (const int64_t share : shares) {
        EXPECT_LT(std::abs(static_cast<double>(share) - wanted[0]), 1.0);
      }
    }
  }
}

TEST(SplitTest, RefusesPartsOfAnotherTotal) {
  EXPECT_THROW(split_by_largest_remainder(std::vector<double>{1, 1}, 1), PluginBug);
  EXPECT_THROW(split_by_largest_remainder(std::vector<double>{1, 1}, 5), PluginBug);
}

}  // namespace
}  // namespace sikv
