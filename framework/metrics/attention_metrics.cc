#include "framework/metrics/attention_metrics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "framework/base/error.h"

namespace sikv {
namespace {

template <typename T>
double relative(std::span<const T> a, std::span<const double> b) {
  SIKV_ASSERT(a.size() == b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double d = static_cast<double>(a[i]) - b[i];
    difference += d * d;
    norm += b[i] * b[i];
  }
  return difference == 0 ? 0.0 : std::sqrt(difference / norm);
}

}  // namespace

ExactAttention exact_attention(const float* q, const float* keys, const float* values, int group,
                               int head_dim, int64_t num_tokens, double scale) {
  ExactAttention exact{group, head_dim, num_tokens, {}, {}};
  const size_t n = static_cast<size_t>(num_tokens), D = static_cast<size_t>(head_dim);
  exact.p.resize(static_cast<size_t>(group) * n);
  exact.out.assign(static_cast<size_t>(group) * D, 0.0);
  for (size_t g = 0; g < static_cast<size_t>(group); ++g) {
    double* const p = exact.p.data() + g * n;
    for (size_t t = 0; t < n; ++t) {
      double logit = 0;
      for (size_t d = 0; d < D; ++d) {
        logit += static_cast<double>(q[g * D + d]) * static_cast<double>(keys[t * D + d]);
      }
      p[t] = logit * scale;
    }
    const double top = *std::max_element(p, p + n);
    double total = 0;
    for (size_t t = 0; t < n; ++t) total += p[t] = std::exp(p[t] - top);
    double* const out = exact.out.data() + g * D;
    for (size_t t = 0; t < n; ++t) {
      p[t] /= total;
      for (size_t d = 0; d < D; ++d) out[d] += p[t] * static_cast<double>(values[t * D + d]);
    }
  }
  return exact;
}

double relative_error(std::span<const double> a, std::span<const double> b) {
  return relative(a, b);
}
double relative_error(std::span<const float> a, std::span<const double> b) {
  return relative(a, b);
}

SelectionQuality judge_selection(const ExactAttention& exact, const float* values,
                                 const AttendedSet& attended, std::optional<int64_t> budget) {
  const size_t n = static_cast<size_t>(exact.num_tokens), D = static_cast<size_t>(exact.head_dim);
  const size_t encoded = static_cast<size_t>(attended.encoded);
  enum : uint8_t { kOut, kSelected, kPinned };
  std::vector<uint8_t> state(n, kOut);
  for (int32_t t : attended.selected) state[static_cast<size_t>(t)] = kSelected;
  for (int32_t t : attended.pinned) state[static_cast<size_t>(t)] = kPinned;

  SelectionQuality quality{};
  std::vector<double> mean(encoded, 0.0), out(exact.out.size(), 0.0);
  for (size_t g = 0; g < static_cast<size_t>(exact.group); ++g) {
    const double* const p = exact.p.data() + g * n;
    double kept = 0;
    for (size_t t = 0; t < n; ++t) {
      if (t < encoded) mean[t] += p[t] / exact.group;
      if (t < encoded && state[t] == kOut) continue;
      kept += p[t];
      for (size_t d = 0; d < D; ++d) {
        out[g * D + d] += p[t] * static_cast<double>(values[t * D + d]);
      }
    }
    for (size_t d = 0; d < D && kept > 0; ++d) out[g * D + d] /= kept;
    quality.dropped_mass += (1.0 - kept) / exact.group;
  }
  quality.dropped_mass = std::max(0.0, quality.dropped_mass);  // rounding when all is kept
  quality.selection_error = relative_error(std::span<const double>(out), exact.out);

  if (budget) {
    std::vector<int32_t> rivals;
    for (size_t t = 0; t < encoded; ++t) {
      if (state[t] != kPinned) rivals.push_back(static_cast<int32_t>(t));
    }
    const size_t k = std::min(rivals.size(), static_cast<size_t>(std::max<int64_t>(*budget, 0)));
    const auto better = [&](int32_t a, int32_t b) {
      const double x = mean[static_cast<size_t>(a)], y = mean[static_cast<size_t>(b)];
      return x > y || (x == y && a < b);
    };
    std::nth_element(rivals.begin(), rivals.begin() + static_cast<int64_t>(k), rivals.end(),
                     better);
    const auto hits =
        std::count_if(rivals.begin(), rivals.begin() + static_cast<int64_t>(k),
                      [&](int32_t t) { return state[static_cast<size_t>(t)] == kSelected; });
    if (k > 0) quality.recall = static_cast<double>(hits) / static_cast<double>(k);
  }
  return quality;
}

}  // namespace sikv
