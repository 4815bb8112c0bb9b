// The loops that a forward pass spends its time in, besides BLAS: SIMD where the build has Highway,
// scalar otherwise.
#ifndef SIKV_FRAMEWORK_MODEL_VECTOR_MATH_H_
#define SIKV_FRAMEWORK_MODEL_VECTOR_MATH_H_

#include <cstdint>

#include "framework/model/weight_matrix.h"

namespace sikv::vector_math {

// Rows of x that one pass over the weights serves.
inline constexpr int64_t kMaxRows = 4;

// out[i * out_stride + r] = x [n, columns] row i . weights row r, for r in [first, last); n in
// [1, kMaxRows].
void multiply_rows(const WeightMatrix& matrix, int64_t first, int64_t last, const float* x,
                   int64_t n, float* out, int64_t out_stride);
void multiply_rows_ref(const WeightMatrix& matrix, int64_t first, int64_t last, const float* x,
                       int64_t n, float* out, int64_t out_stride);

// out [columns] = one row as fp32.
void load_row(const WeightMatrix& matrix, int64_t row, float* out);

// Largest of x [n]; n >= 1.
float largest(const float* x, int64_t n);
// x [n] <- exp(x - shift); returns the sum.
float exp_minus(float* x, int64_t n, float shift);
// gate [n] <- silu(gate) * up
void silu_multiply(float* gate, const float* up, int64_t n);

}  // namespace sikv::vector_math

#endif  // SIKV_FRAMEWORK_MODEL_VECTOR_MATH_H_
