#include "kernels/common/gaussian_directions.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

namespace sikv {
namespace {

TEST(GaussianDirections, BitsAreTheGoldenOnes) {
  EXPECT_EQ(gaussian_directions(0, 6),
            (std::vector<float>{-0x1.25733ep-2f, 0x1.5d2612p+0f, 0x1.676a78p-2f, -0x1.47458p+1f,
                                0x1.36c63ap-1f, -0x1.452672p-1f}));
}

TEST(GaussianDirections, CosIsTheLibrarys) {
  for (int i = 0; i <= 80000; ++i) {
    const double u = i / 8e4;
    ASSERT_NEAR(ieee_cos_turns(u), std::cos(2 * std::numbers::pi * u), 1e-15) << u;
  }
}

}  // namespace
}  // namespace sikv
