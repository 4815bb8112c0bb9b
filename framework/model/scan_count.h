// How often a selector scanned.
#ifndef SIKV_FRAMEWORK_MODEL_SCAN_COUNT_H_
#define SIKV_FRAMEWORK_MODEL_SCAN_COUNT_H_

#include <optional>

#include "framework/pipeline/pipeline.h"

namespace sikv {

// Scans per (layer, KV head) and step so far; nothing for selectors that do not count them.
std::optional<double> scans_per_step(const Pipeline& pipeline);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_SCAN_COUNT_H_
