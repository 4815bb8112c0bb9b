// Principal axes of rows: eigenvectors of their covariance, the widest first.
#ifndef SIKV_KERNELS_COMMON_PCA_H_
#define SIKV_KERNELS_COMMON_PCA_H_

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/symmetric_eigen.h"

namespace sikv {

struct Pca {
  int dim = 0;
  std::vector<float> mean;         // [dim]
  std::vector<float> eigenvalues;  // [dim] variance along each axis, falling, not negative
  std::vector<float> axes;         // [dim, dim] row i = axis i
};

// rows [n, dim], n >= 0; the covariance is divided by n.
inline Pca pca(std::span<const float> rows, int n, int dim) {
  const auto size = static_cast<size_t>(dim);
  std::vector<double> mean(size), centred(size), covariance(size * size);
  const auto row = [&](int i) { return rows.data() + int64_t{i} * dim; };
  for (int i = 0; i < n; ++i) {
    for (size_t d = 0; d < size; ++d) mean[d] += double{row(i)[d]} / n;
  }
  for (int i = 0; i < n; ++i) {
    for (size_t d = 0; d < size; ++d) centred[d] = row(i)[d] - mean[d];
    for (size_t a = 0; a < size; ++a) {
      double* out = covariance.data() + a * size;
      const double x = centred[a] / n;
      for (size_t b = 0; b <= a; ++b) out[b] += x * centred[b];
    }
  }
  for (size_t a = 0; a < size; ++a) {
    for (size_t b = 0; b < a; ++b) covariance[b * size + a] = covariance[a * size + b];
  }
  const Eigen eigen = symmetric_eigen(std::move(covariance), dim);
  Pca fit;
  fit.dim = dim;
  fit.mean.assign(mean.begin(), mean.end());
  for (double value : eigen.values)
    fit.eigenvalues.push_back(static_cast<float>(std::max(value, 0.0)));
  fit.axes.assign(eigen.vectors.begin(), eigen.vectors.end());
  return fit;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_PCA_H_
