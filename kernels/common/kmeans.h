// Lloyd's k-means with a seeded k-means++ start (Arthur and Vassilvitskii 2007).
//
// Sums are taken in a fixed order, one accumulator per centroid or channel, so a fit is the same on
// every machine and the loops still run in vectors.
#ifndef SIKV_KERNELS_COMMON_KMEANS_H_
#define SIKV_KERNELS_COMMON_KMEANS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "plugins/layouts/rotation.h"

namespace sikv {

struct KMeansOptions {
  int centroids = 64;
  int iterations = 25;  // at most; it ends where no assignment changes
  uint64_t seed = 0;
  bool spherical = false;  // centroids of norm 1, for rows of norm 1
};

struct KMeans {
  int count = 0;  // centroids: fewer than asked for where there are fewer distinct rows
  int dim = 0;
  std::vector<float> centroids;     // [count, dim]
  std::vector<int32_t> assignment;  // [n] the nearest centroid, the lower of equal ones
  double inertia = 0.0;             // sum of squared distances to it
};

// Centroids to compare rows with. Channels lie outermost, so that what one row has to do with all
// centroids is a loop over contiguous numbers.
class Centroids {
 public:
  Centroids() = default;
  Centroids(std::span<const float> centroids, int count, int dim)
      : count_(static_cast<size_t>(count)),
        dim_(static_cast<size_t>(dim)),
        by_channel_(centroids.size()) {
    for (size_t c = 0; c < count_; ++c) {
      for (size_t d = 0; d < dim_; ++d) by_channel_[d * count_ + c] = centroids[c * dim_ + d];
    }
  }

  int count() const { return static_cast<int>(count_); }
  int dim() const { return static_cast<int>(dim_); }
  uint64_t bytes() const { return by_channel_.size() * sizeof(float); }
  const float* data() const { return by_channel_.data(); }  // [dim, count]
  float at(int centroid, int channel) const {
    return by_channel_[static_cast<size_t>(channel) * count_ + static_cast<size_t>(centroid)];
  }

  // out [count] = squared distances of row [dim].
  void distances(const float* row, float* out) const {
    std::fill_n(out, count_, 0.0f);
    for (size_t d = 0; d < dim_; ++d) {
      const float* channel = by_channel_.data() + d * count_;
      for (size_t c = 0; c < count_; ++c) {
        out[c] += (row[d] - channel[c]) * (row[d] - channel[c]);
      }
    }
  }
  // out [count] = dot products with row [dim].
  void dots(const float* row, float* out) const {
    std::fill_n(out, count_, 0.0f);
    for (size_t d = 0; d < dim_; ++d) {
      const float* channel = by_channel_.data() + d * count_;
      for (size_t c = 0; c < count_; ++c) out[c] += row[d] * channel[c];
    }
  }
  // The nearest to row [dim], the lower of equal ones; `scratch` [count] gets the distances.
  int32_t nearest(const float* row, float* scratch) const {
    distances(row, scratch);
    return static_cast<int32_t>(std::min_element(scratch, scratch + count_) - scratch);
  }

 private:
  size_t count_ = 0, dim_ = 0;
  std::vector<float> by_channel_;
};

namespace kmeans_detail {

inline float squared_distance(const float* a, const float* b, int dim) {
  float sum = 0.0f;
  for (int d = 0; d < dim; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

// Each next centroid is a row, drawn with probability proportional to its squared distance from the
// nearest one so far.
inline int start(std::span<const float> rows, int n, int dim, const KMeansOptions& options,
                 std::vector<float>& centroids) {
  uint64_t state = options.seed;
  const auto uniform = [&] {
    state = rotation::splitmix64(state);
    return static_cast<double>(state >> 11) * 0x1p-53;
  };
  std::vector<float> nearest(static_cast<size_t>(n), std::numeric_limits<float>::infinity());
  int chosen = std::min(n - 1, static_cast<int>(uniform() * n));
  for (int count = 1;; ++count) {
    const float* added = rows.data() + int64_t{chosen} * dim;
    centroids.insert(centroids.end(), added, added + dim);
    if (count == options.centroids) return count;
    double total = 0.0;
    for (int i = 0; i < n; ++i) {
      float& best = nearest[static_cast<size_t>(i)];
      best = std::min(best, squared_distance(rows.data() + int64_t{i} * dim, added, dim));
      total += best;
    }
    if (total <= 0.0) return count;
    double left = uniform() * total;
    chosen = -1;
    for (int i = 0; i < n; ++i) {
      const float weight = nearest[static_cast<size_t>(i)];
      if (weight <= 0.0f) continue;
      chosen = i;
      if ((left -= weight) < 0.0) break;
    }
  }
}

inline void normalise(float* x, int dim) {
  double sum = 0.0;
  for (int d = 0; d < dim; ++d) sum += double{x[d]} * x[d];
  if (sum <= 0.0) return;
  for (int d = 0; d < dim; ++d) x[d] = static_cast<float>(x[d] / std::sqrt(sum));
}

}  // namespace kmeans_detail

// rows [n, dim]. A cluster that loses its last row gets the row furthest from its own centroid.
inline KMeans kmeans(std::span<const float> rows, int n, int dim, const KMeansOptions& options) {
  namespace detail = kmeans_detail;
  KMeans fit;
  fit.dim = dim;
  if (n == 0) return fit;
  fit.count = detail::start(rows, n, dim, options, fit.centroids);
  fit.assignment.assign(static_cast<size_t>(n), -1);
  std::vector<float> distances(static_cast<size_t>(n));
  const auto row = [&](int i) { return rows.data() + int64_t{i} * dim; };

  std::vector<float> scratch(static_cast<size_t>(fit.count));
  const auto assign = [&] {
    const Centroids centroids(fit.centroids, fit.count, dim);
    bool changed = false;
    fit.inertia = 0.0;
    for (int i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(i);
      const int32_t best = centroids.nearest(row(i), scratch.data());
      changed |= best != fit.assignment[at];
      fit.assignment[at] = best;
      distances[at] = scratch[static_cast<size_t>(best)];
      fit.inertia += distances[at];
    }
    return changed;
  };
  const auto update = [&] {
    std::vector<double> sums(fit.centroids.size());
    std::vector<int> members(static_cast<size_t>(fit.count));
    for (int i = 0; i < n; ++i) {
      const auto c = static_cast<size_t>(fit.assignment[static_cast<size_t>(i)]);
      ++members[c];
      for (int d = 0; d < dim; ++d)
        sums[c * static_cast<size_t>(dim) + static_cast<size_t>(d)] += row(i)[d];
    }
    for (size_t c = 0; c < members.size(); ++c) {
      float* centroid = fit.centroids.data() + c * static_cast<size_t>(dim);
      if (members[c] > 0) {
        const double* sum = sums.data() + c * static_cast<size_t>(dim);
        for (int d = 0; d < dim; ++d) centroid[d] = static_cast<float>(sum[d] / members[c]);
      } else {
        const auto furthest = std::max_element(distances.begin(), distances.end());
        if (*furthest <= 0.0f) continue;
        *furthest = 0.0f;
        std::copy_n(row(static_cast<int>(furthest - distances.begin())), dim, centroid);
      }
      if (options.spherical) detail::normalise(centroid, dim);
    }
  };

  if (options.spherical) {
    for (int c = 0; c < fit.count; ++c)
      detail::normalise(fit.centroids.data() + int64_t{c} * dim, dim);
  }
  for (int i = 0; assign() && i < options.iterations; ++i) update();
  return fit;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_KMEANS_H_
