#include "kernels/common/lloyd_levels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace sikv {
namespace {

TEST(LloydLevelsTest, SeparateClustersGetTheirMeans) {
  LevelCells cells(-1.0, 1.0, 64);
  for (const double x : {-0.9, -0.8, -0.1, 0.0, 0.7, 0.9, 0.95}) cells.add(x);
  const std::vector<double> levels = cells.levels(3, 50);
  EXPECT_NEAR(levels[0], -0.85, 1e-12);
  EXPECT_NEAR(levels[1], -0.05, 1e-12);
  EXPECT_NEAR(levels[2], 0.85, 1e-12);
}

TEST(LloydLevelsTest, WeightsPullLevels) {
  LevelCells cells(0.0, 1.0, 16);
  cells.add(0.25, 3.0);
  cells.add(0.75, 1.0);
  EXPECT_DOUBLE_EQ(cells.levels(1, 50)[0], 0.375);
}

TEST(LloydLevelsTest, FewerNumbersThanLevelsAreAllLevels) {
  LevelCells cells(-1.0, 1.0, 64);
  for (const double x : {-0.5, 0.25, 0.75}) cells.add(x);
  const std::vector<double> levels = cells.levels(8, 50);
  EXPECT_TRUE(std::is_sorted(levels.begin(), levels.end()));
  for (const double x : {-0.5, 0.25, 0.75}) {
    EXPECT_NE(std::find(levels.begin(), levels.end(), x), levels.end()) << x;
  }
  EXPECT_EQ(LevelCells(-1.0, 1.0, 64).levels(4, 50), std::vector<double>(4, 0.0));
}

// Max 1960, table 1: the unit normal at 2 bits.
TEST(LloydLevelsTest, TheUnitNormalGetsItsLloydMaxLevels) {
  LevelCells cells(-8.0, 8.0, 1 << 14);
  for (int i = 0; i < 1 << 14; ++i) {
    const double x = -8.0 + (i + 0.5) * 0x1p-10;
    cells.add(x, std::exp(-x * x / 2));
  }
  const std::vector<double> levels = cells.levels(4, 1000);
  EXPECT_NEAR(levels[0], -1.5104, 1e-3);
  EXPECT_NEAR(levels[1], -0.4528, 1e-3);
  EXPECT_NEAR(levels[2], 0.4528, 1e-3);
  EXPECT_NEAR(levels[3], 1.5104, 1e-3);
}

}  // namespace
}  // namespace sikv
