// One-bit Johnson-Lindenstrauss sketch: the signs of S x and ||x|| estimate x without bias.
//
// S [rows, dim] stands in blocks of dim rows, each a random orthogonal matrix (Haar: gaussian rows
// from a seed, made orthonormal one after the other). Stored signs depend on its last bits: they are
// those of gaussian_directions.h, + - * / and sqrt in one order. For one such row u, E sign(<u, x>) u
// = mu x / ||x|| with mu = E |u_1|, so
//
//   x_hat = ||x|| / (rows mu) sum_i sign(<u_i, x>) u_i,     mu = G(dim/2) / (sqrt(pi) G((dim+1)/2))
//
// has E x_hat = x exactly, and E <q, x_hat> = <q, x>. mu is sqrt(2 / (pi dim)) for large dim, which
// gives the papers' sqrt(pi/2) / rows for rows of norm sqrt(dim). With orthogonal rows the error at
// rows = dim is (pi/2 - 1) ||x||^2; independent gaussian rows would have pi/2 ||x||^2.
#ifndef SIKV_KERNELS_COMMON_SIGN_SKETCH_H_
#define SIKV_KERNELS_COMMON_SIGN_SKETCH_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

#include "kernels/common/gaussian_directions.h"
#include "plugins/layouts/bitpack.h"

namespace sikv {

class SignSketch {
 public:
  SignSketch() = default;
  // Without rows it holds nothing. dim is even.
  SignSketch(int rows, int dim, uint64_t seed)
      : rows_(static_cast<size_t>(rows)), dim_(static_cast<size_t>(dim)) {
    matrix_ = gaussian_directions(seed, int64_t{rows} * dim);
    for (size_t first = 0; first < rows_; first += dim_) {
      orthonormalise(first, std::min(rows_, first + dim_));
    }
    transposed_.resize(matrix_.size());
    for (size_t i = 0; i < rows_; ++i) {
      for (size_t d = 0; d < dim_; ++d) transposed_[d * rows_ + i] = matrix_[i * dim_ + d];
    }
  }

  int rows() const { return static_cast<int>(rows_); }

  // bits [row_bytes(1, rows)]: bit i = <u_i, x> is not negative.
  void sketch(const float* x, uint8_t* bits) const {
    std::vector<float> sides(rows_);
    for (size_t d = 0; d < dim_; ++d) {
      const float* column = transposed_.data() + d * rows_;
      for (size_t i = 0; i < rows_; ++i) sides[i] += x[d] * column[i];
    }
    for (int i = 0; i < rows(); ++i) {
      bitpack::set(bits, 1, i, sides[static_cast<size_t>(i)] >= 0.0f ? 1 : 0);
    }
  }

  // x [D] += the estimate of a vector of this norm from its signs.
  void add_estimate(const uint8_t* bits, float norm, float* x) const {
    std::vector<float> sum(dim_);
    for (int i = 0; i < rows(); ++i) {
      const float* row = matrix_.data() + static_cast<size_t>(i) * dim_;
      const float sign = bitpack::get(bits, 1, i) != 0 ? 1.0f : -1.0f;
      for (size_t d = 0; d < dim_; ++d) sum[d] += sign * row[d];
    }
    const auto weight = static_cast<float>(norm / (rows() * mean_side(static_cast<int>(dim_))));
    for (size_t d = 0; d < dim_; ++d) x[d] += weight * sum[d];
  }

  // mu: 2 / pi for dim = 2, times k / (k + 1/2) from 2 k to 2 k + 2 dimensions.
  static double mean_side(int dim) {
    double mean = 2.0 / std::numbers::pi;
    for (int k = 1; 2 * k < dim; ++k) mean *= k / (k + 0.5);
    return mean;
  }

 private:
  void orthonormalise(size_t first, size_t end) {
    for (size_t i = first; i < end; ++i) {
      float* row = matrix_.data() + i * dim_;
      std::vector<double> x(row, row + dim_);
      for (size_t j = first; j < i; ++j) {
        const float* other = matrix_.data() + j * dim_;
        double dot = 0.0;
        for (size_t d = 0; d < dim_; ++d) dot += x[d] * other[d];
        for (size_t d = 0; d < dim_; ++d) x[d] -= dot * other[d];
      }
      double squares = 0.0;
      for (const double value : x) squares += value * value;
      for (size_t d = 0; d < dim_; ++d) row[d] = static_cast<float>(x[d] / std::sqrt(squares));
    }
  }

  size_t rows_ = 0, dim_ = 0;
  std::vector<float> matrix_, transposed_;  // [rows, dim], [dim, rows]
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIGN_SKETCH_H_
