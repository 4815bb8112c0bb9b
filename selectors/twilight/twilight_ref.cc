// Scalar reference: sums in fp64, candidates sorted.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "selectors/twilight/twilight.h"

namespace sikv::twilight {
namespace {

double dot(const float* a, const float* b, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

void copy_logits(const uint8_t* copies, std::span<const int32_t> positions, const float* q,
                 int group, int head_dim, float* logits, int64_t stride) {
  std::vector<float> key(static_cast<size_t>(head_dim));
  for (size_t t = 0; t < positions.size(); ++t) {
    const uint8_t* copy = copies + int64_t{positions[t]} * copy_bytes(head_dim);
    float scale, zero;
    std::memcpy(&scale, copy, sizeof scale);
    std::memcpy(&zero, copy + 4, sizeof zero);
    for (int i = 0; i < head_dim; ++i) {
      const int byte = copy[kHeaderBytes + i % (head_dim / 2)];
      key[static_cast<size_t>(i)] =
          zero + scale * static_cast<float>(i < head_dim / 2 ? byte & 15 : byte >> 4);
    }
    for (int g = 0; g < group; ++g) {
      logits[g * stride + static_cast<int64_t>(t)] =
          static_cast<float>(dot(q + g * head_dim, key.data(), head_dim));
    }
  }
}

void exact_logits(const ExactKeys& keys, const float* q, int group, int head_dim, float* logits,
                  int64_t stride) {
  std::vector<float> key(static_cast<size_t>(head_dim));
  for (int t = 0; t < keys.count; ++t) {
    load_floats(keys.data, keys.dtype, keys.first + t * keys.stride, head_dim, key.data());
    for (int g = 0; g < group; ++g) {
      logits[g * stride + t] = static_cast<float>(dot(q + g * head_dim, key.data(), head_dim));
    }
  }
}

void mean_softmax(float* logits, int64_t stride, int group, int64_t n, float* weights) {
  std::vector<double> mean(static_cast<size_t>(n)), e(mean.size());
  for (int g = 0; g < group && n > 0; ++g) {
    const float* row = logits + g * stride;
    const double max = *std::max_element(row, row + n);
    for (size_t i = 0; i < e.size(); ++i) e[i] = std::exp(row[i] - max);
    const double sum = std::accumulate(e.begin(), e.end(), 0.0);
    for (size_t i = 0; i < e.size(); ++i) mean[i] += e[i] / sum / group;
  }
  std::transform(mean.begin(), mean.end(), weights, [](double x) { return static_cast<float>(x); });
}

void smallest_set(std::span<const float> weights, double mass, uint8_t* kept) {
  std::vector<size_t> order(weights.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return weights[a] > weights[b]; });
  std::fill_n(kept, weights.size(), uint8_t{0});
  double sum = 0.0;
  for (size_t i = 0; i < order.size() && sum < mass; ++i) {
    kept[order[i]] = 1;
    sum += weights[order[i]];
  }
}

constexpr Math kMath = {copy_logits, exact_logits, mean_softmax, smallest_set};

}  // namespace

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) { return make(args, kMath); }

}  // namespace sikv::twilight
