#include "framework/model/weight_matrix.h"

#include <cblas.h>

#include <algorithm>

#include "framework/device/parallel.h"
#include "framework/model/vector_math.h"

namespace sikv {
namespace {

// Rows of x from which BLAS pays: below, weights are streamed once per kMaxRows rows.
constexpr int64_t kBlasRows = 8;

// One task of the BLAS path: kTaskRows weights rows times kTaskTokens rows of x. Dequantising costs
// a fiftieth of the multiplication, and a layer of 500 x 500 still gives every worker a task.
constexpr int64_t kTaskRows = 256, kTaskTokens = 256;

// Rows of weights in one task of a decode step.
constexpr int64_t kStreamRows = 64;

void add_bias(const float* bias, int64_t first, int64_t last, int64_t n, int64_t stride,
              float* out) {
  if (bias == nullptr) return;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = first; r < last; ++r) out[i * stride + r] += bias[r];
  }
}

struct Task {
  const Product* product;
  int64_t first_row, last_row, first_token, last_token;
};

std::vector<Task> tasks_of(std::span<const Product> products, int64_t n, int64_t rows,
                           int64_t tokens) {
  std::vector<Task> tasks;
  for (const Product& product : products) {
    for (int64_t r = 0; r < product.matrix->rows; r += rows) {
      for (int64_t t = 0; t < n; t += tokens) {
        tasks.push_back(
            {&product, r, std::min(r + rows, product.matrix->rows), t, std::min(t + tokens, n)});
      }
    }
  }
  return tasks;
}

void run_streamed(const Task& task, const float* x) {
  const WeightMatrix& matrix = *task.product->matrix;
  float* const out = task.product->out + task.first_token * matrix.rows;
  vector_math::multiply_rows(matrix, task.first_row, task.last_row,
                             x + task.first_token * matrix.columns,
                             task.last_token - task.first_token, out, matrix.rows);
  add_bias(task.product->bias, task.first_row, task.last_row, task.last_token - task.first_token,
           matrix.rows, out);
}

void run_blas(const Task& task, const float* x, std::vector<float>& scratch) {
  const WeightMatrix& matrix = *task.product->matrix;
  const int64_t rows = task.last_row - task.first_row, tokens = task.last_token - task.first_token;
  const float* weights = reinterpret_cast<const float*>(matrix.row(task.first_row));
  if (matrix.type != WeightType::kFp32) {
    scratch.resize(static_cast<size_t>(rows * matrix.columns));
    for (int64_t r = 0; r < rows; ++r) {
      vector_math::load_row(matrix, task.first_row + r, scratch.data() + r * matrix.columns);
    }
    weights = scratch.data();
  }
  float* const out = task.product->out + task.first_token * matrix.rows;
  const auto blas = [](int64_t value) { return static_cast<blasint>(value); };
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, blas(tokens), blas(rows),
              blas(matrix.columns), 1.0f, x + task.first_token * matrix.columns,
              blas(matrix.columns), weights, blas(matrix.columns), 0.0f, out + task.first_row,
              blas(matrix.rows));
  add_bias(task.product->bias, task.first_row, task.last_row, tokens, matrix.rows, out);
}

}  // namespace

void multiply(Device& device, std::span<const Product> products, const float* x, int64_t n) {
  if (n < kBlasRows) {
    const auto tasks = tasks_of(products, n, kStreamRows, vector_math::kMaxRows);
    parallel_for(device, static_cast<int64_t>(tasks.size()),
                 [&](int64_t i, int) { run_streamed(tasks[static_cast<size_t>(i)], x); });
    return;
  }
  const auto tasks = tasks_of(products, n, kTaskRows, kTaskTokens);
  std::vector<std::vector<float>> scratch(static_cast<size_t>(device.info().num_threads));
  parallel_for(device, static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    run_blas(tasks[static_cast<size_t>(i)], x, scratch[static_cast<size_t>(worker)]);
  });
}

void load_weights(const WeightMatrix& matrix, int64_t row, float* out) {
  vector_math::load_row(matrix, row, out);
}

}  // namespace sikv
