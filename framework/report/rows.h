// Result rows as files: JSON for programs, CSV for spreadsheets.
//
//   {"environment": {...}, "source": "...", "rows": [
//     {"pipeline": "<printed form>", "budget": 96,
//      "metrics": {"recall": {"mean": 0.708, "p95": ..., "p99": ...}, ..., "bytes_per_token": 44,
//                  "compression": 5.8, "compression_total": 4.1, "memory_per_token": 46.1},
//      "memory": {"index_code": 983040, ..., "total": ...},
//      "latency_us": {"prefill": {"fit": ..., "encode": ..., "observe": ...},
//                     "append": {"mean": ..., "median": ..., "p95": ...}, "select": ...,
//                     "attend": ...},
//      "variants": {"keys": "cpu", ...}, "counters": {...},
//      "bytes_read": {"scan": 30720, "attended": 90000}, "tokens_selected": 96}]}
//
// Bytes per token are those of the pages in use per encoded token, evicted ones too; `compression`
// is that of a stored token. Tails are the bad side of each metric. Latencies are sums over all layers; bytes read and
// tokens selected are of one KV head in one layer and step, null where nothing counted them.
#ifndef SIKV_FRAMEWORK_REPORT_ROWS_H_
#define SIKV_FRAMEWORK_REPORT_ROWS_H_

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "framework/cache/ledger.h"
#include "framework/experiment/measure.h"
#include "framework/metrics/summary.h"

namespace sikv {

nlohmann::ordered_json row_json(const Measured& measured);
// What row_json made of it, as far as it says: medians of metrics and ids of variants are lost.
// Throws nlohmann::json::exception if fields are missing or of another type.
Measured measured_of(const nlohmann::ordered_json& row);

// Parts of a row that other results have too.
nlohmann::ordered_json memory_json(const Ledger& ledger);
nlohmann::ordered_json latency_json(const std::map<std::string, double>& prefill_s,
                                    const std::map<std::string, Summary>& step_s);
nlohmann::ordered_json variants_json(std::span<const ChosenVariant> variants);
nlohmann::ordered_json bytes_read_json(const std::optional<double>& scan,
                                       const std::optional<double>& attended);

// Seconds of one decode step: the sum of its stages' means. Medians would lose what is done only
// every few steps, as scans and the encoding of full pages are.
double step_seconds(const std::map<std::string, Summary>& step_s);
// The same of select and attend alone; of the whole "step" where it was replayed as one.
double attention_seconds(const std::map<std::string, Summary>& step_s);

// One line per row under a header with a column for every value of the JSON rows, named by its path
// as in metrics.recall.mean; what a row lacks is an empty field.
std::string rows_csv(std::span<const nlohmann::ordered_json> rows);

// Error if no file can be written there. To be asked before the work whose result goes there.
void check_writable(const std::filesystem::path& path);
// The same for results: what is there already may only be an older result (JSON with an
// environment that is no sweep, or rows_csv), so that a slip of the hand does not replace a config or a trace.
void check_result_path(const std::filesystem::path& path);
// And for other files: what is there must begin with `start`, as `what` ("a trace") does.
void check_replaceable(const std::filesystem::path& path, std::string_view start,
                       std::string_view what);

void write_text(const std::filesystem::path& path, const std::string& text);
void write_json(const std::filesystem::path& path, const nlohmann::ordered_json& json);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REPORT_ROWS_H_
