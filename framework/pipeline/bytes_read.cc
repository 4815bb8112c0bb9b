#include "framework/pipeline/bytes_read.h"

#include "framework/cache/kv_cache.h"

namespace sikv {
namespace {

std::optional<double> ratio(const Counters& counters, const char* counted, const char* of) {
  const auto found = counters.find(counted), per = counters.find(of);
  if (found == counters.end() || per == counters.end() || per->second <= 0) return std::nullopt;
  return found->second / per->second;
}

}  // namespace

Counters counters_by_name(const Pipeline& pipeline) {
  Counters counters;
  for (const sikv_counter& counter : pipeline.counters()) counters[counter.name] = counter.value;
  return counters;
}

std::optional<double> attended_bytes(const Pipeline& pipeline, const AttendedTokens& tokens) {
  if (tokens.rows == 0) return std::nullopt;
  const sikv_layout& key = pipeline.composition().key_layout();
  const sikv_layout& value = pipeline.composition().value_layout();
  const sikv_cache_view& view = pipeline.cache().view(0);
  const auto encoded_token = static_cast<double>(layout_page_bytes(key) + layout_page_bytes(value) +
                                                 line_padding_page_bytes(key, value)) /
                             SIKV_PAGE_TOKENS;
  const double exact_token = 2.0 * view.head_dim * sikv_dtype_bytes(view.dtype);
  return (tokens.encoded * encoded_token + tokens.exact * exact_token) / tokens.rows;
}

std::optional<double> scan_bytes(const Counters& counters) {
  return ratio(counters, "scan_bytes", "runs");
}

std::optional<double> scans_per_step(const Counters& counters) {
  return ratio(counters, "scans", "rows");
}

}  // namespace sikv
