#include "kernels/common/pca.h"

#include <gtest/gtest.h>

#include "framework/base/random.h"

namespace sikv {
namespace {

std::vector<double> random_symmetric(int n, int rank, uint64_t seed) {
  Random random(seed);
  std::vector<double> matrix(static_cast<size_t>(n * n)), v(static_cast<size_t>(n));
  for (int r = 0; r < rank; ++r) {
    const double weight = random.normal();
    for (double& x : v) x = random.normal();
    for (size_t i = 0; i < v.size(); ++i) {
      for (size_t j = 0; j < v.size(); ++j) matrix[i * v.size() + j] += weight * v[i] * v[j];
    }
  }
  return matrix;
}

void expect_decomposition(const std::vector<double>& matrix, int n) {
  const Eigen eigen = symmetric_eigen(matrix, n);
  const auto size = static_cast<size_t>(n);
  double scale = 1e-300;
  for (double x : matrix) scale = std::max(scale, std::abs(x));
  for (size_t i = 0; i < size; ++i) {
    const double* v = &eigen.vectors[i * size];
    EXPECT_GE(eigen.values[i == 0 ? 0 : i - 1], eigen.values[i]);
    for (size_t r = 0; r < size; ++r) {
      double product = 0.0;
      for (size_t c = 0; c < size; ++c) product += matrix[r * size + c] * v[c];
      EXPECT_NEAR(product, eigen.values[i] * v[r], 1e-12 * scale * n);
    }
    for (size_t j = 0; j <= i; ++j) {
      double product = 0.0;
      for (size_t c = 0; c < size; ++c) product += v[c] * eigen.vectors[j * size + c];
      EXPECT_NEAR(product, i == j ? 1.0 : 0.0, 1e-12);
    }
  }
}

TEST(SymmetricEigenTest, GivesOrthonormalEigenvectors) {
  for (int n : {1, 2, 3, 7, 64, 128}) {
    SCOPED_TRACE(n);
    expect_decomposition(random_symmetric(n, n, 1), n);
    expect_decomposition(random_symmetric(n, 1, 2), n);
    expect_decomposition(random_symmetric(n, n / 3, 3), n);
  }
}

TEST(SymmetricEigenTest, TakesDegenerateMatrices) {
  const std::vector<double> zero(64, 0.0);
  expect_decomposition(zero, 8);
  std::vector<double> identity = zero;
  for (size_t i = 0; i < 8; ++i) identity[9 * i] = 1.0;
  expect_decomposition(identity, 8);
  expect_decomposition(std::vector<double>(64, 1.0), 8);
  expect_decomposition({0, 1, 1, 0}, 2);
  expect_decomposition({1e-30, 1e-20, 1e-20, 1e10}, 2);
}

// Three planted directions of falling width in 32 channels around a mean.
TEST(PcaTest, FindsPlantedAxes) {
  constexpr int kRows = 4000, kDim = 32;
  std::vector<double> planted = symmetric_eigen(random_symmetric(kDim, kDim, 4), kDim).vectors;
  Random random(5);
  std::vector<float> rows(size_t{kRows} * kDim);
  for (size_t i = 0; i < kRows; ++i) {
    const double along[3] = {10 * random.normal(), 5 * random.normal(), 2 * random.normal()};
    for (size_t d = 0; d < kDim; ++d) {
      double x = 3.0 + 0.01 * random.normal();
      for (size_t a = 0; a < 3; ++a) x += along[a] * planted[a * kDim + d];
      rows[i * kDim + d] = static_cast<float>(x);
    }
  }
  const Pca fit = pca(rows, kRows, kDim);
  const double variance[3] = {100, 25, 4};
  for (size_t a = 0; a < 3; ++a) {
    double cosine = 0.0;
    for (size_t d = 0; d < kDim; ++d) cosine += fit.axes[a * kDim + d] * planted[a * kDim + d];
    EXPECT_GT(std::abs(cosine), 0.99);
    EXPECT_NEAR(fit.eigenvalues[a] / variance[a], 1.0, 0.1);
  }
  EXPECT_LT(fit.eigenvalues[3], 1e-3f);
  EXPECT_NEAR(fit.mean[0], 3.0f, 0.5f);
}

// Few rows, and rows of which none differs but by rounding: nearly all columns depend on the others,
// and each that is eliminated leaves about 2^-52 of the one before.
TEST(PcaTest, GivesAxesOfRowsThatDependOnEachOther) {
  for (const int dim : {64, 128, 256}) {
    SCOPED_TRACE(dim);
    const auto size = static_cast<size_t>(dim);
    for (const float scale : {32752.0f, 0x1p57f}) {
      Random random(1);
      std::vector<float> rows;
      while (rows.size() < 3 * size) rows.push_back(random.below(2) != 0 ? scale : -scale);
      const Pca fit = pca(rows, 3, dim);
      EXPECT_GT(fit.eigenvalues[1], scale);
      EXPECT_LE(fit.eigenvalues[2], 1e-12f * fit.eigenvalues[0]);
    }
    for (const int n : {33, 257, 300}) {
      const Pca fit = pca(std::vector<float>(static_cast<size_t>(n) * size, 0.75f), n, dim);
      EXPECT_LE(fit.eigenvalues[0], 1e-24f);
      for (const float x : fit.axes) ASSERT_LE(std::abs(x), 1.001f);
    }
  }
}

TEST(PcaTest, GivesAxesWithoutRows) {
  const Pca fit = pca({}, 0, 4);
  EXPECT_EQ(fit.axes, (std::vector<float>{1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}));
  EXPECT_EQ(fit.eigenvalues, std::vector<float>(4, 0.0f));
}

}  // namespace
}  // namespace sikv
