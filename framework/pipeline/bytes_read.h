// What decode steps read, per step for one KV head of one layer, on average.
#ifndef SIKV_FRAMEWORK_PIPELINE_BYTES_READ_H_
#define SIKV_FRAMEWORK_PIPELINE_BYTES_READ_H_

#include <map>
#include <optional>
#include <string>

#include "framework/pipeline/pipeline.h"

namespace sikv {

// K and V of one token in fp16: what dense attention reads and ratios compare with.
constexpr double dense_row_bytes(int head_dim) { return 4.0 * head_dim; }

// Values of a selector's counters by name.
using Counters = std::map<std::string, double>;
Counters counters_by_name(const Pipeline& pipeline);

// Bytes of K and V that are attended to: encoded ones by the layouts, exact ones in the cache's type.
// Nothing where no row was counted.
std::optional<double> attended_bytes(const Pipeline& pipeline, const AttendedTokens& tokens);

// Bytes that the selector reads to decide; nothing for selectors that do not count them.
std::optional<double> scan_bytes(const Counters& counters);
// The share of rows that a selector scans at a step; nothing for selectors that do not count it.
std::optional<double> scans_per_step(const Counters& counters);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_PIPELINE_BYTES_READ_H_
