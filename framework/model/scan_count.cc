#include "framework/model/scan_count.h"

#include <string_view>

namespace sikv {

std::optional<double> scans_per_step(const Pipeline& pipeline) {
  std::optional<double> scans, rows;
  for (const sikv_counter& counter : pipeline.counters()) {
    if (std::string_view(counter.name) == "scans") scans = counter.value;
    if (std::string_view(counter.name) == "rows") rows = counter.value;
  }
  if (!scans || !rows || *rows == 0) return std::nullopt;
  return *scans / *rows;
}

}  // namespace sikv
