#include "framework/base/random.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <vector>

#include "plugins/abi/sikv_log.h"

namespace sikv {
namespace {

// Reference values: splitmix64's published first outputs; the others from an independent
// implementation in Python (statistics.NormalDist.inv_cdf is AS 241 too).
TEST(Random, GoldenValues) {
  Random words(0);
  EXPECT_EQ(words.next(), 0xe220a8397b1dcdafull);
  EXPECT_EQ(words.next(), 0x6e789e6aa1b965f4ull);
  EXPECT_EQ(words.next(), 0x06c45d188009454full);

  Random uniforms(42);
  EXPECT_EQ(uniforms.uniform(), 0.7415648787718233);
  EXPECT_EQ(uniforms.uniform(), 0.1599103928769201);

  Random normals(42);
  EXPECT_NEAR(normals.normal(), 0.648177361328852, 1e-15);
  EXPECT_NEAR(normals.normal(), -0.9948262318051991, 1e-15);
  EXPECT_NEAR(normals.normal(), -0.5870021533389611, 1e-15);

  Random bounded(42);
  for (const uint64_t expected : {413u, 291u, 858u, 764u, 250u}) {
    EXPECT_EQ(bounded.below(1000), expected);
  }
}

TEST(Random, QuantileMatchesReference) {
  EXPECT_NEAR(normal_quantile(1e-300), -37.0470962993612, 1e-13);
  EXPECT_NEAR(normal_quantile(1e-12), -7.034483825301132, 1e-14);
  EXPECT_NEAR(normal_quantile(1e-5), -4.2648907939228256, 1e-14);
  EXPECT_NEAR(normal_quantile(0.07), -1.4757910281791702, 1e-15);
  EXPECT_NEAR(normal_quantile(0.3), -0.5244005127080407, 1e-15);
  EXPECT_EQ(normal_quantile(0.5), 0.0);
  EXPECT_NEAR(normal_quantile(0.999), 3.090232306167813, 1e-14);
}

TEST(Random, LogMatchesTheLibrarys) {
  for (double x = 0x1p-54; x < 1; x *= 1.0001) {
    ASSERT_NEAR(sikv_log(x), std::log(x), 4e-16 * std::abs(std::log(x)) + 1e-16) << x;
  }
  for (double x = 1e-300; x < 1e300; x *= 1.7) {
    EXPECT_NEAR(sikv_log(x), std::log(x), 2e-16 + 4e-16 * std::abs(std::log(x))) << x;
  }
  EXPECT_EQ(sikv_log(1.0), 0.0);
}

TEST(Random, NormalsHaveTheRightMoments) {
  Random random(7);
  std::vector<float> bulk(1 << 20);
  random.fill_normal(bulk);
  double sum = 0, squares = 0, fourth = 0;
  for (const float x : bulk) {
    sum += x;
    squares += x * x;
    fourth += std::pow(x, 4);
  }
  const double n = static_cast<double>(bulk.size());
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2 / n));
  EXPECT_NEAR(fourth / n, 3, 5 * std::sqrt(96 / n));
}

TEST(Random, OddFillIsAPrefixOfALongerOne) {
  std::vector<float> shorter(7), longer(8);
  Random(3).fill_normal(shorter);
  Random(3).fill_normal(longer);
  longer.resize(7);
  EXPECT_EQ(shorter, longer);
}

TEST(Random, BelowCoversItsRangeEvenly) {
  Random random(11);
  std::array<int, 6> counts{};
  for (int i = 0; i < 60000; ++i) ++counts.at(random.below(6));
  for (const int count : counts) EXPECT_NEAR(count, 10000, 5 * std::sqrt(10000));
  EXPECT_EQ(random.below(1), 0u);
}

TEST(Random, DerivedSeedsDiffer) {
  EXPECT_NE(derive_seed(1, 0), derive_seed(1, 1));
  EXPECT_NE(derive_seed(1, 0), derive_seed(2, 0));
  EXPECT_NE(derive_seed(derive_seed(1, 2), 3), derive_seed(derive_seed(1, 3), 2));
}

}  // namespace
}  // namespace sikv
