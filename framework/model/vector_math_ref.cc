#include <algorithm>
#include <cmath>
#include <cstring>

#include "framework/model/vector_math.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv::vector_math {
namespace {

float load(const WeightMatrix& matrix, int64_t row, int64_t column) {
  const std::byte* const data = matrix.row(row);
  switch (matrix.type) {
    case WeightType::kFp32:
      return sikv_load(data, SIKV_FP32, column);
    case WeightType::kFp16:
      return sikv_load(data, SIKV_FP16, column);
    case WeightType::kBf16:
      return sikv_load(data, SIKV_BF16, column);
    case WeightType::kInt8:
      return matrix.scale[static_cast<size_t>(row)] *
             static_cast<float>(static_cast<int8_t>(data[column]));
  }
  return 0;
}

}  // namespace

void multiply_rows_ref(const WeightMatrix& matrix, int64_t first, int64_t last, const float* x,
                       int64_t n, float* out, int64_t out_stride) {
  for (int64_t r = first; r < last; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      float sum = 0;
      for (int64_t c = 0; c < matrix.columns; ++c) {
        sum += load(matrix, r, c) * x[i * matrix.columns + c];
      }
      out[i * out_stride + r] = sum;
    }
  }
}

#ifndef SIKV_HAS_SIMD

void multiply_rows(const WeightMatrix& matrix, int64_t first, int64_t last, const float* x,
                   int64_t n, float* out, int64_t out_stride) {
  multiply_rows_ref(matrix, first, last, x, n, out, out_stride);
}

void load_row(const WeightMatrix& matrix, int64_t row, float* out) {
  for (int64_t c = 0; c < matrix.columns; ++c) out[c] = load(matrix, row, c);
}

float largest(const float* x, int64_t n) { return *std::max_element(x, x + n); }

float exp_minus(float* x, int64_t n, float shift) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - shift);
  return sum;
}

void silu_multiply(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

#endif  // SIKV_HAS_SIMD

}  // namespace sikv::vector_math
