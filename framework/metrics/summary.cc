#include "framework/metrics/summary.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace sikv {

Summary summarize(std::span<const double> samples, BadSide bad) {
  Summary summary;
  summary.bad = bad;
  if (samples.empty()) {
    summary.mean = summary.median = summary.p95 = summary.p99 =
        std::numeric_limits<double>::quiet_NaN();
    return summary;
  }
  std::vector<double> sorted(samples.begin(), samples.end());
  std::sort(sorted.begin(), sorted.end());
  const double n = static_cast<double>(sorted.size());
  summary.mean = std::accumulate(sorted.begin(), sorted.end(), 0.0) / n;
  if (bad == BadSide::kLow) std::reverse(sorted.begin(), sorted.end());
  const auto rank = [&](double share) {
    return sorted[static_cast<size_t>(std::max(1.0, std::ceil(share * n))) - 1];
  };
  summary.median = rank(0.50);
  summary.p95 = rank(0.95);
  summary.p99 = rank(0.99);
  return summary;
}

}  // namespace sikv
