#include "framework/model/vector_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "framework/base/random.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {
namespace {

std::vector<float> normals(int64_t n, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(n));
  Random(seed).fill_normal(x);
  return x;
}

WeightMatrix random_matrix(WeightType type, int64_t rows, int64_t columns, uint64_t seed) {
  WeightMatrix matrix{type, rows, columns, {}, {}};
  const auto values = normals(rows * columns, seed);
  matrix.data.resize(values.size() * static_cast<size_t>(weight_bytes(type)));
  for (size_t i = 0; i < values.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    if (type == WeightType::kInt8) {
      matrix.data[i] = static_cast<std::byte>(static_cast<int8_t>(40 * values[i]));
    } else {
      sikv_store(matrix.data.data(),
                 type == WeightType::kFp32   ? SIKV_FP32
                 : type == WeightType::kFp16 ? SIKV_FP16
                                             : SIKV_BF16,
                 at, values[i]);
    }
  }
  if (type == WeightType::kInt8) {
    for (int64_t r = 0; r < rows; ++r) matrix.scale.push_back(0.01f * static_cast<float>(r + 1));
  }
  return matrix;
}

constexpr WeightType kTypes[] = {WeightType::kFp32, WeightType::kFp16, WeightType::kBf16,
                                 WeightType::kInt8};

// A sum of n fp32 products in another order is off by at most n + 2 roundings (int8: its scale) of
// the largest partial sum; that of magnitudes bounds it.
double tolerance(const WeightMatrix& matrix, int64_t row, const float* x) {
  std::vector<float> weights(static_cast<size_t>(matrix.columns));
  load_weights(matrix, row, weights.data());
  double magnitude = 0;
  for (int64_t c = 0; c < matrix.columns; ++c) {
    magnitude += std::abs(double{weights[static_cast<size_t>(c)]} * x[c]);
  }
  return magnitude * static_cast<double>(matrix.columns + 2) * 0x1p-24 + 1e-30;
}

TEST(VectorMath, MultiplyRowsMatchesTheReference) {
  for (const WeightType type : kTypes) {
    for (const int64_t columns : {1, 3, 31, 64, 577}) {
      const int64_t rows = 11;
      const WeightMatrix matrix = random_matrix(type, rows, columns, 1);
      for (int64_t n = 1; n <= vector_math::kMaxRows; ++n) {
        const auto x = normals(n * columns, 2);
        std::vector<float> out(static_cast<size_t>(n * rows), NAN), expected(out);
        vector_math::multiply_rows(matrix, 2, rows - 1, x.data(), n, out.data(), rows);
        vector_math::multiply_rows_ref(matrix, 2, rows - 1, x.data(), n, expected.data(), rows);
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t r = 0; r < rows; ++r) {
            const size_t at = static_cast<size_t>(i * rows + r);
            if (r < 2 || r == rows - 1) {
              EXPECT_TRUE(std::isnan(out[at])) << "wrote outside";
            } else {
              EXPECT_NEAR(out[at], expected[at], tolerance(matrix, r, x.data() + i * columns))
                  << "type " << int(type) << ", columns " << columns << ", n " << n;
            }
          }
        }
      }
    }
  }
}

TEST(WeightMatrix, ProductsOfAnyNumberOfRowsAgree) {
  const auto device = open_cpu_device(3);
  for (const WeightType type : kTypes) {
    const WeightMatrix a = random_matrix(type, 300, 70, 3), b = random_matrix(type, 5, 70, 4);
    const auto bias = normals(300, 5);
    for (const int64_t n : {1, 2, 5, 7, 8, 9, 257, 300}) {
      const auto x = normals(n * 70, 6);
      std::vector<float> out_a(static_cast<size_t>(n * 300)), out_b(static_cast<size_t>(n * 5));
      const Product products[] = {{&a, bias.data(), out_a.data()}, {&b, nullptr, out_b.data()}};
      multiply(*device, products, x.data(), n);
      for (int64_t i = 0; i < n; i += std::max<int64_t>(1, n - 1)) {
        std::vector<float> expected_a(300), expected_b(5);
        const float* const x_i = x.data() + i * 70;
        vector_math::multiply_rows_ref(a, 0, 300, x_i, 1, expected_a.data(), 300);
        vector_math::multiply_rows_ref(b, 0, 5, x_i, 1, expected_b.data(), 5);
        for (int64_t r = 0; r < 300; ++r) {
          const size_t at = static_cast<size_t>(r);
          EXPECT_NEAR(out_a[static_cast<size_t>(i * 300 + r)], expected_a[at] + bias[at],
                      tolerance(a, r, x_i) + 1e-6);
        }
        for (int64_t r = 0; r < 5; ++r) {
          EXPECT_NEAR(out_b[static_cast<size_t>(i * 5 + r)], expected_b[static_cast<size_t>(r)],
                      tolerance(b, r, x_i));
        }
      }
    }
  }
}

TEST(VectorMath, LoadRowIsExact) {
  for (const WeightType type : kTypes) {
    const WeightMatrix matrix = random_matrix(type, 4, 37, 7);
    std::vector<float> row(37), unit(37), expected(1);
    vector_math::load_row(matrix, 2, row.data());
    for (size_t c = 0; c < row.size(); ++c) {
      std::fill(unit.begin(), unit.end(), 0.0f);
      unit[c] = 1;
      vector_math::multiply_rows_ref(matrix, 2, 3, unit.data(), 1, expected.data() - 2, 1);
      EXPECT_EQ(row[c], expected[0]);
    }
  }
}

TEST(VectorMath, SoftmaxAndSiluMatchDoubles) {
  for (const int64_t n : {1, 2, 15, 16, 17, 100}) {
    const auto x = normals(n, 8);
    const float highest = vector_math::largest(x.data(), n);
    EXPECT_EQ(highest, *std::max_element(x.begin(), x.end()));
    auto e = x;
    const float sum = vector_math::exp_minus(e.data(), n, highest);
    double expected_sum = 0;
    for (size_t i = 0; i < e.size(); ++i) {
      const double expected = std::exp(double{x[i]} - highest);
      EXPECT_NEAR(e[i], expected, 1e-6 * expected);
      expected_sum += expected;
    }
    EXPECT_NEAR(sum, expected_sum, 1e-5 * expected_sum);
  }
  std::vector<float> gate = {-1e30f, -200, -90, -3, -0.0f, 0, 0.5f, 90, 200, 1e30f};
  for (int i = 0; i < 20; ++i) gate.push_back(0.3f * static_cast<float>(i - 10));
  const std::vector<float> before = gate, up(gate.size(), 2.0f);
  vector_math::silu_multiply(gate.data(), up.data(), static_cast<int64_t>(gate.size()));
  for (size_t i = 0; i < gate.size(); ++i) {
    const double g = before[i], expected = 2 * g / (1 + std::exp(-g));
    EXPECT_NEAR(gate[i], expected, 1e-5 * std::abs(expected) + 1e-7) << before[i];
  }
}

}  // namespace
}  // namespace sikv
