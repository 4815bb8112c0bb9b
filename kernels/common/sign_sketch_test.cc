#include "kernels/common/sign_sketch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

namespace sikv {
namespace {

// The rows themselves: an estimate is a weighted sum of rows with signs, so turning one sign around
// shows one row.
std::vector<std::vector<double>> rows_of(const SignSketch& sketch, int dim) {
  const int rows = sketch.rows();
  const double weight = 1.0 / (rows * SignSketch::mean_side(dim));
  const auto estimate = [&](const std::vector<uint8_t>& signs) {
    std::vector<float> x(static_cast<size_t>(dim), 0.0f);
    sketch.add_estimate(signs.data(), 1.0f, x.data());
    return x;
  };
  std::vector<uint8_t> signs(static_cast<size_t>(rows / 8), 0xff);
  const std::vector<float> all = estimate(signs);
  std::vector<std::vector<double>> out;
  for (int i = 0; i < rows; ++i) {
    bitpack::set(signs.data(), 1, i, 0);
    const std::vector<float> without = estimate(signs);
    bitpack::set(signs.data(), 1, i, 1);
    auto& row = out.emplace_back();
    for (size_t d = 0; d < all.size(); ++d) {
      row.push_back((double{all[d]} - without[d]) / (2 * weight));
    }
  }
  return out;
}

TEST(SignSketch, RowsOfABlockAreOrthonormal) {
  for (const int dim : {64, 96}) {
    const auto rows = rows_of(SignSketch(2 * dim, dim, 5), dim);
    double between_blocks = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      for (size_t j = 0; j <= i; ++j) {
        double dot = 0;
        for (size_t d = 0; d < rows[i].size(); ++d) dot += rows[i][d] * rows[j][d];
        if (i / rows[i].size() == j / rows[i].size()) {
          ASSERT_NEAR(dot, i == j ? 1.0 : 0.0, 1e-4) << dim << ": " << i << " and " << j;
        } else {
          between_blocks = std::max(between_blocks, std::fabs(dot));
        }
      }
    }
    EXPECT_GT(between_blocks, 0.1);  // blocks are drawn each for itself
  }
}

TEST(SignSketch, BitsAreTheSidesOfTheRows) {
  constexpr int kDim = 64;
  const SignSketch sketch(kDim, kDim, 6);
  const auto rows = rows_of(sketch, kDim);
  std::vector<float> x;
  for (int d = 0; d < kDim; ++d) x.push_back(std::sin(1.7f * static_cast<float>(d)));
  std::vector<uint8_t> bits(kDim / 8);
  sketch.sketch(x.data(), bits.data());
  for (int i = 0; i < kDim; ++i) {
    double side = 0;
    for (int d = 0; d < kDim; ++d)
      side += rows[static_cast<size_t>(i)][static_cast<size_t>(d)] * x[static_cast<size_t>(d)];
    if (std::fabs(side) < 1e-3) continue;
    EXPECT_EQ(bitpack::get(bits.data(), 1, i), side > 0 ? 1u : 0u) << i;
  }
}

// E |u_1| of a random direction: 2 / pi in the plane and sqrt(2 / (pi D)) far out.
TEST(SignSketch, TheMeanSideIsThatOfTheSphere) {
  EXPECT_NEAR(SignSketch::mean_side(2), 2 / std::numbers::pi, 1e-12);
  EXPECT_NEAR(SignSketch::mean_side(256), std::sqrt(2 / (std::numbers::pi * 256)), 1e-4);
}

}  // namespace
}  // namespace sikv
