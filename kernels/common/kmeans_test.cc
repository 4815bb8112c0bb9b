#include "kernels/common/kmeans.h"

#include <gtest/gtest.h>

#include <set>

#include "framework/base/random.h"

namespace sikv {
namespace {

std::vector<float> gaussian(int n, int dim, uint64_t seed) {
  std::vector<float> rows(static_cast<size_t>(n * dim));
  Random(seed).fill_normal(rows);
  return rows;
}

TEST(KMeansTest, FindsSeparateClusters) {
  constexpr int kClusters = 5, kDim = 8, kEach = 40;
  std::vector<float> rows = gaussian(kClusters * kEach, kDim, 1);
  for (size_t i = 0; i < rows.size(); ++i) {
    const size_t cluster = i / kDim / kEach;
    rows[i] = 0.1f * rows[i] + (i % kDim == cluster ? 20.0f : 0.0f);
  }
  for (uint64_t seed = 0; seed < 10; ++seed) {
    const KMeans fit =
        kmeans(rows, kClusters * kEach, kDim, {.centroids = kClusters, .seed = seed});
    ASSERT_EQ(fit.count, kClusters);
    std::set<int32_t> used;
    for (size_t i = 0; i < fit.assignment.size(); ++i) {
      used.insert(fit.assignment[i]);
      EXPECT_EQ(fit.assignment[i], fit.assignment[i / kEach * kEach]);
    }
    EXPECT_EQ(used.size(), size_t{kClusters});
  }
}

// What Lloyd's fixed point is: rows with their nearest centroid, centroids the means of their rows.
TEST(KMeansTest, EndsInAFixedPoint) {
  constexpr int kRows = 300, kDim = 4;
  const std::vector<float> rows = gaussian(kRows, kDim, 2);
  const KMeans fit = kmeans(rows, kRows, kDim, {.centroids = 16, .iterations = 1000});
  std::vector<double> sums(16 * kDim);
  std::vector<int> members(16);
  double inertia = 0.0;
  for (int i = 0; i < kRows; ++i) {
    const int own = fit.assignment[static_cast<size_t>(i)];
    const auto distance = [&](int c) {
      return kmeans_detail::squared_distance(&rows[static_cast<size_t>(i * kDim)],
                                             &fit.centroids[static_cast<size_t>(c * kDim)], kDim);
    };
    for (int c = 0; c < fit.count; ++c) EXPECT_LE(distance(own), distance(c));
    inertia += distance(own);
    ++members[static_cast<size_t>(own)];
    for (int d = 0; d < kDim; ++d) {
      sums[static_cast<size_t>(own * kDim + d)] += rows[static_cast<size_t>(i * kDim + d)];
    }
  }
  EXPECT_NEAR(fit.inertia, inertia, 1e-3);
  for (int c = 0; c < 16; ++c) {
    ASSERT_GT(members[static_cast<size_t>(c)], 0);
    for (int d = 0; d < kDim; ++d) {
      const auto at = static_cast<size_t>(c * kDim + d);
      EXPECT_NEAR(fit.centroids[at], sums[at] / members[static_cast<size_t>(c)], 1e-5);
    }
  }
  const Centroids centroids(fit.centroids, fit.count, kDim);
  std::vector<float> scratch(16);
  for (int i = 0; i < kRows; ++i) {
    EXPECT_EQ(centroids.nearest(&rows[static_cast<size_t>(i * kDim)], scratch.data()),
              fit.assignment[static_cast<size_t>(i)]);
  }
}

TEST(KMeansTest, GetsNoWorseWithMoreIterations) {
  const std::vector<float> rows = gaussian(500, 8, 3);
  double before = std::numeric_limits<double>::infinity();
  for (int iterations = 0; iterations < 12; ++iterations) {
    const KMeans fit = kmeans(rows, 500, 8, {.centroids = 20, .iterations = iterations, .seed = 4});
    EXPECT_LE(fit.inertia, before * (1.0 + 1e-6));
    before = fit.inertia;
  }
}

TEST(KMeansTest, TakesNoMoreCentroidsThanDistinctRows) {
  const std::vector<float> rows = {1, 1, 2, 2, 1, 1, 2, 2, 3, 3};
  const KMeans fit = kmeans(rows, 5, 2, {.centroids = 64});
  EXPECT_EQ(fit.count, 3);
  EXPECT_EQ(fit.inertia, 0.0);
  EXPECT_EQ(kmeans({}, 0, 2, {}).count, 0);
}

TEST(KMeansTest, KeepsSphericalCentroidsOnTheSphere) {
  std::vector<float> rows = gaussian(200, 8, 5);
  for (size_t i = 0; i < 200; ++i) kmeans_detail::normalise(&rows[i * 8], 8);
  const KMeans fit = kmeans(rows, 200, 8, {.centroids = 10, .spherical = true});
  for (size_t c = 0; c < 10; ++c) {
    float norm = 0.0f;
    for (size_t d = 0; d < 8; ++d) norm += fit.centroids[c * 8 + d] * fit.centroids[c * 8 + d];
    EXPECT_NEAR(norm, 1.0f, 1e-5f);
  }
}

// Starts, found by trying thousands, that lose the last row of a cluster on the way.
TEST(KMeansTest, FillsEmptyClustersAgain) {
  struct Start {
    int dim, rows, centroids;
    uint64_t seed;
  };
  for (const Start& s : {Start{1, 200, 60, 844}, Start{2, 40, 10, 1191}, Start{3, 24, 12, 1840}}) {
    std::vector<float> rows = gaussian(s.rows, s.dim, s.seed);
    for (float& x : rows) x = x * x * x;
    const KMeans fit =
        kmeans(rows, s.rows, s.dim, {.centroids = s.centroids, .iterations = 100, .seed = s.seed});
    EXPECT_EQ(std::set<int32_t>(fit.assignment.begin(), fit.assignment.end()).size(),
              static_cast<size_t>(s.centroids));
  }
}

}  // namespace
}  // namespace sikv
