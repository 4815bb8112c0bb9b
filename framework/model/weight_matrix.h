// The weights of a linear layer as stored, and their product with activations.
#ifndef SIKV_FRAMEWORK_MODEL_WEIGHT_MATRIX_H_
#define SIKV_FRAMEWORK_MODEL_WEIGHT_MATRIX_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "framework/device/device.h"
#include "framework/model/weight_allocator.h"

namespace sikv {

enum class WeightType { kFp32, kFp16, kBf16, kInt8 };

constexpr int weight_bytes(WeightType type) {
  return type == WeightType::kFp32 ? 4 : type == WeightType::kInt8 ? 1 : 2;
}

// [rows = outputs, columns = inputs], row-major.
struct WeightMatrix {
  WeightType type = WeightType::kFp32;
  int64_t rows = 0, columns = 0;
  std::vector<std::byte, WeightAllocator<std::byte>> data;
  std::vector<float> scale;  // [rows] of int8: weight = scale[row] * element; else empty

  const std::byte* row(int64_t i) const { return data.data() + i * columns * weight_bytes(type); }
  uint64_t bytes() const {
    return static_cast<uint64_t>(rows * columns * weight_bytes(type)) +
           scale.size() * sizeof(float);
  }
};

// out [n, rows] = x [n, columns] . matrix^T + bias
struct Product {
  const WeightMatrix* matrix;
  const float* bias;  // [rows] or nullptr
  float* out;
};

// All products of the same x, on all workers of `device`: a few rows of x stream the weights as
// they are stored, many go through BLAS by blocks of fp32 weights.
void multiply(Device& device, std::span<const Product> products, const float* x, int64_t n);

// out [columns] = one row as fp32.
void load_weights(const WeightMatrix& matrix, int64_t row, float* out);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_WEIGHT_MATRIX_H_
