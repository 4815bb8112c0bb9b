// Whole shares of a total: largest-remainder rounding, which never loses or gains one.
#ifndef SIKV_PLUGINS_SDK_SPLIT_H_
#define SIKV_PLUGINS_SDK_SPLIT_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "plugins/sdk/error.h"

namespace sikv {

// shares [n] whole numbers with the sum `total`, each `wanted` (>= 0, of that sum up to rounding)
// rounded down or up; those with the largest fractions are rounded up, the first among equals.
inline std::vector<int64_t> split_by_largest_remainder(std::span<const double> wanted,
                                                       int64_t total) {
  // What is this near to a whole number was meant to be one.
  constexpr double kRounding = 1e-9;
  std::vector<int64_t> shares;
  std::vector<double> fractions;
  for (const double w : wanted) {
    shares.push_back(static_cast<int64_t>(std::floor(w * (1 + kRounding) + kRounding)));
    fractions.push_back(w - static_cast<double>(shares.back()));
  }
  const int64_t missing = total - std::accumulate(shares.begin(), shares.end(), int64_t{0});
  if (missing < 0 || missing > std::ssize(shares)) {
    throw PluginBug("shares that are to sum to " + std::to_string(total) + " miss it by " +
                    std::to_string(missing));
  }
  std::vector<size_t> order(shares.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return fractions[a] > fractions[b]; });
  for (int64_t i = 0; i < missing; ++i) ++shares[order[static_cast<size_t>(i)]];
  return shares;
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_SPLIT_H_
