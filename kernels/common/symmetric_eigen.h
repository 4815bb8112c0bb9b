// Eigenvalues and eigenvectors of a symmetric matrix: Householder reflections to tridiagonal form,
// then QR steps with Wilkinson's shift (Golub and Van Loan, Matrix Computations, 8.3). About 10 n^3
// operations.
#ifndef SIKV_KERNELS_COMMON_SYMMETRIC_EIGEN_H_
#define SIKV_KERNELS_COMMON_SYMMETRIC_EIGEN_H_

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "plugins/sdk/error.h"

namespace sikv {

struct Eigen {
  std::vector<double> values;   // [n] falling
  std::vector<double> vectors;  // [n, n] row i belongs to value i; norm 1
};

namespace eigen_detail {

// Rows of a square matrix.
class Square {
 public:
  Square(std::vector<double> entries, int n) : entries_(std::move(entries)), n_(n) {}
  static Square identity(int n) {
    Square square(std::vector<double>(static_cast<size_t>(n) * static_cast<size_t>(n)), n);
    for (int i = 0; i < n; ++i) square[i][i] = 1.0;
    return square;
  }
  double* operator[](int row) {
    return entries_.data() + static_cast<size_t>(row) * static_cast<size_t>(n_);
  }

 private:
  std::vector<double> entries_;
  int n_;
};

struct Tridiagonal {
  std::vector<double> diagonal, off;  // [n], [n - 1]
  Square basis;                       // matrix = basis^T * tridiagonal * basis
};

inline Tridiagonal reduce(Square a, int n) {
  Tridiagonal result{std::vector<double>(static_cast<size_t>(n)),
                     std::vector<double>(static_cast<size_t>(std::max(n - 1, 0))),
                     Square::identity(n)};
  std::vector<double> v(static_cast<size_t>(n)), w(static_cast<size_t>(n));
  for (int k = 0; k + 1 < n; ++k) {
    // Reflect column k below the diagonal onto its first entry.
    double norm = 0.0;
    for (int i = k + 1; i < n; ++i) norm = std::hypot(norm, a[i][k]);
    const double first = a[k + 1][k], target = first > 0.0 ? -norm : norm;
    double square = 0.0;
    for (int i = k + 1; i < n; ++i) {
      v[static_cast<size_t>(i)] = a[i][k] - (i == k + 1 ? target : 0.0);
      square += v[static_cast<size_t>(i)] * v[static_cast<size_t>(i)];
    }
    result.off[static_cast<size_t>(k)] = target;
    // Nothing, or what rounding left of columns that depend on each other, too small to divide by.
    if (square < std::numeric_limits<double>::min()) continue;
    const double beta = 2.0 / square;
    std::fill(w.begin(), w.end(), 0.0);
    for (int i = k + 1; i < n; ++i) {
      const double x = beta * v[static_cast<size_t>(i)];
      for (int j = k + 1; j < n; ++j) w[static_cast<size_t>(j)] += x * a[i][j];
    }
    double along = 0.0;
    for (int i = k + 1; i < n; ++i) along += v[static_cast<size_t>(i)] * w[static_cast<size_t>(i)];
    for (int i = k + 1; i < n; ++i) {
      w[static_cast<size_t>(i)] -= 0.5 * beta * along * v[static_cast<size_t>(i)];
    }
    for (int i = k + 1; i < n; ++i) {
      const double vi = v[static_cast<size_t>(i)], wi = w[static_cast<size_t>(i)];
      for (int j = k + 1; j < n; ++j) {
        a[i][j] -= vi * w[static_cast<size_t>(j)] + wi * v[static_cast<size_t>(j)];
      }
    }
    std::vector<double> along_rows(static_cast<size_t>(n));
    for (int i = k + 1; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        along_rows[static_cast<size_t>(j)] += v[static_cast<size_t>(i)] * result.basis[i][j];
      }
    }
    for (int i = k + 1; i < n; ++i) {
      const double x = beta * v[static_cast<size_t>(i)];
      for (int j = 0; j < n; ++j) result.basis[i][j] -= x * along_rows[static_cast<size_t>(j)];
    }
  }
  for (int i = 0; i < n; ++i) result.diagonal[static_cast<size_t>(i)] = a[i][i];
  return result;
}

// One implicit QR step on rows low .. high.
inline void qr_step(Tridiagonal& t, int low, int high, int n) {
  double* d = t.diagonal.data();
  double* e = t.off.data();
  const double half = 0.5 * (d[high - 1] - d[high]), last = e[high - 1];
  const double root = std::hypot(half, last);
  const double shift = d[high] - last * last / (half + (half < 0.0 ? -root : root));
  double x = d[low] - shift, z = e[low];
  for (int k = low; k < high; ++k) {
    const double r = std::hypot(x, z), c = r > 0.0 ? x / r : 1.0, s = r > 0.0 ? z / r : 0.0;
    if (k > low) e[k - 1] = r;
    const double a = d[k], b = e[k], g = d[k + 1];
    d[k] = c * c * a + 2.0 * c * s * b + s * s * g;
    d[k + 1] = s * s * a - 2.0 * c * s * b + c * c * g;
    e[k] = c * s * (g - a) + (c * c - s * s) * b;
    if (k + 1 < high) {
      x = e[k];
      z = s * e[k + 1];
      e[k + 1] *= c;
    }
    double* upper = t.basis[k];
    double* lower = t.basis[k + 1];
    for (int j = 0; j < n; ++j) {
      const double u = upper[j], l = lower[j];
      upper[j] = c * u + s * l;
      lower[j] = c * l - s * u;
    }
  }
}

inline void diagonalise(Tridiagonal& t, int n) {
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  double largest = 0.0;
  for (double x : t.diagonal) largest = std::max(largest, std::abs(x));
  for (double x : t.off) largest = std::max(largest, std::abs(x));
  const auto is_zero = [&](int i) {
    const auto at = static_cast<size_t>(i);
    const double beside = std::abs(t.diagonal[at]) + std::abs(t.diagonal[at + 1]);
    return std::abs(t.off[at]) <= kEpsilon * std::max(beside, kEpsilon * largest);
  };
  int steps = 0;
  for (int high = n - 1; high > 0;) {
    if (is_zero(high - 1)) {
      --high;
      continue;
    }
    int low = high - 1;
    while (low > 0 && !is_zero(low - 1)) --low;
    if (++steps > 60 * n) throw PluginBug("the eigenvalues of a matrix do not converge");
    qr_step(t, low, high, n);
  }
}

}  // namespace eigen_detail

// matrix [n, n]. Each vector's largest entry, the first of equal ones, is positive.
inline Eigen symmetric_eigen(std::vector<double> matrix, int n) {
  using namespace eigen_detail;
  Tridiagonal t = reduce(Square(std::move(matrix), n), n);
  diagonalise(t, n);
  std::vector<int> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return t.diagonal[static_cast<size_t>(a)] > t.diagonal[static_cast<size_t>(b)];
  });
  Eigen result;
  for (int i : order) {
    result.values.push_back(t.diagonal[static_cast<size_t>(i)]);
    const double* vector = t.basis[i];
    double largest = 0.0;
    for (int j = 0; j < n; ++j) {
      if (std::abs(vector[j]) > std::abs(largest)) largest = vector[j];
    }
    for (int j = 0; j < n; ++j) result.vectors.push_back(largest < 0.0 ? -vector[j] : vector[j]);
  }
  return result;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SYMMETRIC_EIGEN_H_
