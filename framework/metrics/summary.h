// Mean and tails of a metric over (layer, KV head, step).
#ifndef SIKV_FRAMEWORK_METRICS_SUMMARY_H_
#define SIKV_FRAMEWORK_METRICS_SUMMARY_H_

#include <span>

namespace sikv {

// Which end of a metric hurts: the tails are taken there.
enum class BadSide { kHigh, kLow };

struct Summary {
  double mean = 0, median = 0, p95 = 0, p99 = 0;
  BadSide bad = BadSide::kHigh;
};

// p95: 5% of the samples are worse (nearest rank). NaN everywhere for no samples.
Summary summarize(std::span<const double> samples, BadSide bad);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_METRICS_SUMMARY_H_
