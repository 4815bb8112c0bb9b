#include "framework/report/rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <ostream>
#include <set>
#include <string_view>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/file.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kMicros = 1e6;
// How every rows_csv begins.
constexpr std::string_view kCsvStart = "pipeline,budget";

// RFC 4180: quoted where a separator, a quote or a line break is inside.
std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"') quoted += c;
    quoted += c;
  }
  quoted += '"';
  return quoted;
}

std::string csv_value(const Json& value) {
  if (value.is_null()) return {};
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_number_float()) return value.dump();
  const double number = value.get<double>();
  return std::isfinite(number) ? fmt::format("{}", number) : std::string();
}

// Calls add(name, value) for each value of an object and of those in it, whose names are paths.
template <typename Add>
void add_fields(const Json& object, const std::string& owner, Add&& add) {
  for (const auto& [key, value] : object.items()) {
    const std::string name = owner.empty() ? key : owner + "." + key;
    value.is_object() ? add_fields(value, name, add) : add(name, value);
  }
}

std::string csv_line(std::span<const std::string> fields) {
  std::string line;
  for (size_t i = 0; i < fields.size(); ++i) {
    if (i > 0) line += ',';
    line += csv_field(fields[i]);
  }
  return line + "\r\n";
}

}  // namespace

Json memory_json(const Ledger& ledger) {
  Json memory = Json::object();
  for (const LedgerLine& line : ledger.lines()) memory[line.role] = line.bytes;
  memory["total"] = ledger.total();
  return memory;
}

Json latency_json(const std::map<std::string, double>& prefill_s,
                  const std::map<std::string, Summary>& step_s) {
  Json latency = {{"prefill", Json::object()}};
  for (const auto& [stage, seconds] : prefill_s) latency["prefill"][stage] = seconds * kMicros;
  for (const auto& [stage, summary] : step_s) {
    latency[stage] = {{"mean", summary.mean * kMicros},
                      {"median", summary.median * kMicros},
                      {"p95", summary.p95 * kMicros}};
  }
  return latency;
}

Json variants_json(std::span<const ChosenVariant> variants) {
  Json json = Json::object();
  for (const ChosenVariant& chosen : variants) json[chosen.role] = chosen.variant;
  return json;
}

Json bytes_read_json(const std::optional<double>& scan, const std::optional<double>& attended) {
  const auto or_null = [](const std::optional<double>& bytes) {
    return bytes ? Json(*bytes) : Json();
  };
  return {{"scan", or_null(scan)}, {"attended", or_null(attended)}};
}

Json row_json(const Measured& measured) {
  Json metrics = Json::object();
  for (const auto& [name, summary] : measured.metrics) {
    metrics[name] = {{"mean", summary.mean}, {"p95", summary.p95}, {"p99", summary.p99}};
  }
  metrics["bytes_per_token"] = measured.bytes_per_token;
  metrics["compression"] = measured.compression;
  metrics["compression_total"] = measured.compression_total;
  metrics["memory_per_token"] = measured.memory_per_token;
  Json row = {{"pipeline", measured.pipeline}, {"budget", nullptr}};
  if (measured.budget) row["budget"] = *measured.budget;
  row["metrics"] = std::move(metrics);
  row["memory"] = memory_json(measured.ledger);
  row["latency_us"] = latency_json(measured.prefill_s, measured.step_s);
  row["variants"] = variants_json(measured.variants);
  row["counters"] = measured.counters;
  row["bytes_read"] = bytes_read_json(measured.scan_bytes, measured.attended_bytes);
  row["tokens_selected"] = nullptr;
  if (measured.tokens_selected) row["tokens_selected"] = *measured.tokens_selected;
  return row;
}

Measured measured_of(const Json& row) {
  const auto number = [](const Json& value) {
    return value.is_null() ? std::numeric_limits<double>::quiet_NaN() : value.get<double>();
  };
  Measured measured;
  measured.pipeline = row.at("pipeline");
  if (!row.at("budget").is_null()) measured.budget = row["budget"].get<int64_t>();
  for (const auto& [name, value] : row.at("metrics").items()) {
    if (!value.is_object()) continue;
    Summary summary{number(value.at("mean")), 0, number(value.at("p95")), number(value.at("p99"))};
    summary.bad = name == "recall" ? BadSide::kLow : BadSide::kHigh;
    measured.metrics[name] = summary;
  }
  const Json& metrics = row["metrics"];
  measured.bytes_per_token = number(metrics.at("bytes_per_token"));
  measured.compression = number(metrics.at("compression"));
  measured.compression_total = number(metrics.at("compression_total"));
  measured.memory_per_token = number(metrics.at("memory_per_token"));
  for (const auto& [role, bytes] : row.at("memory").items()) {
    if (role != "total") measured.ledger.add(role, bytes.get<uint64_t>());
  }
  for (const auto& [stage, value] : row.at("latency_us").items()) {
    if (stage == "prefill") {
      for (const auto& [part, us] : value.items()) measured.prefill_s[part] = number(us) / kMicros;
      continue;
    }
    measured.step_s[stage] = {number(value.at("mean")) / kMicros,
                              number(value.at("median")) / kMicros,
                              number(value.at("p95")) / kMicros, 0, BadSide::kHigh};
  }
  for (const auto& [role, variant] : row.at("variants").items()) {
    measured.variants.push_back({role, "", variant});
  }
  for (const auto& [name, value] : row.at("counters").items()) {
    measured.counters[name] = number(value);
  }
  const Json& read = row.at("bytes_read");
  if (!read.at("scan").is_null()) measured.scan_bytes = number(read["scan"]);
  if (!read.at("attended").is_null()) measured.attended_bytes = number(read["attended"]);
  const Json& selected = row.at("tokens_selected");
  if (!selected.is_null()) measured.tokens_selected = number(selected);
  return measured;
}

double step_seconds(const std::map<std::string, Summary>& step_s) {
  double sum = 0;
  for (const auto& [stage, summary] : step_s) sum += summary.mean;
  return sum;
}

double attention_seconds(const std::map<std::string, Summary>& step_s) {
  if (const auto whole = step_s.find("step"); whole != step_s.end()) return whole->second.mean;
  return step_s.at("select").mean + step_s.at("attend").mean;
}

std::string rows_csv(std::span<const Json> rows) {
  std::vector<std::string> header;
  std::vector<std::map<std::string, std::string>> fields(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    add_fields(rows[i], "", [&](const std::string& name, const Json& value) {
      if (std::find(header.begin(), header.end(), name) == header.end()) header.push_back(name);
      fields[i][name] = csv_value(value);
    });
  }
  std::string text = csv_line(header);
  for (std::map<std::string, std::string>& row : fields) {
    std::vector<std::string> line;
    for (const std::string& name : header) line.push_back(row[name]);
    text += csv_line(line);
  }
  return text;
}

void check_writable(const std::filesystem::path& path) { AtomicPath probe(path); }

void check_result_path(const std::filesystem::path& path) {
  check_writable(path);
  std::ifstream file(path, std::ios::binary);
  std::string text(kCsvStart.size(), '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.empty() || text == kCsvStart) return;
  if (text.front() == '{') {
    file.clear();
    file.seekg(0);
    const Json json = Json::parse(file, nullptr, false);
    const Json rows = json.is_object() ? json.value("rows", Json::array()) : Json::array();
    // Rows of comparisons, sweeps and evaluations, which resume, name their setup.
    const bool resumes = std::any_of(rows.begin(), rows.end(),
                                     [](const Json& row) { return row.contains("setup"); });
    if (json.contains("environment") && !resumes) return;
    if (json.contains("environment")) {
      const Json& made = json["environment"];
      const bool named = made.contains("command") && made["command"].is_string();
      throw Error(
          "'{}' exists and holds {} row{} that {} goes on from: give another name, or remove it "
          "first",
          path.string(), rows.size(), rows.size() == 1 ? "" : "s",
          named ? fmt::format("'{}'", made["command"].get<std::string>())
                : "a comparison, a sweep or an evaluation");
    }
  }
  throw Error("'{}' exists and is not a result of sikv: give another name, or remove it first",
              path.string());
}

void check_replaceable(const std::filesystem::path& path, std::string_view start,
                       std::string_view what) {
  check_writable(path);
  std::ifstream file(path, std::ios::binary);
  std::string text(start.size(), '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.empty() || text == start) return;
  throw Error("'{}' exists and is not {}: give another name, or remove it first", path.string(),
              what);
}

void write_text(const std::filesystem::path& path, const std::string& text) {
  write_atomically(path, [&](std::ostream& stream) { stream << text; });
}

void write_json(const std::filesystem::path& path, const Json& json) {
  write_text(path, json.dump(2) + "\n");
}

}  // namespace sikv
