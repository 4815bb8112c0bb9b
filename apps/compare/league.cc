#include "apps/compare/league.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "apps/common/show.h"
#include "framework/pipeline/bytes_read.h"
#include "framework/report/rows.h"
#include "framework/report/scatter.h"

namespace sikv {
namespace {

constexpr int kSmallestClass = 5;

std::optional<ScatterPoint> point_of(const ComparedRow& row) {
  const std::optional<double> bytes = bytes_read(row);
  const auto error = row.measured.metrics.find("output_error");
  if (!bytes || error == row.measured.metrics.end()) return std::nullopt;
  return ScatterPoint{*bytes, error->second.mean};
}

// The classes that occur, ascending.
std::vector<int> classes_of(const std::vector<ComparedRow>& rows) {
  std::vector<int> classes;
  for (const ComparedRow& row : rows) classes.push_back(memory_class(row));
  std::sort(classes.begin(), classes.end());
  classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
  return classes;
}

Table::Cell metric_cell(const ComparedRow& row, const char* name) {
  const auto found = row.measured.metrics.find(name);
  return found == row.measured.metrics.end() ? Table::Cell{"n/a"} : share_cell(found->second.mean);
}

std::string marks(const EntrySpec& entry) {
  std::string text;
  if (!entry.source.empty()) text += fmt::format(" [{}]", entry.source);
  if (!entry.fitted.empty()) text += " +";
  if (!entry.reconstruction.empty()) text += " ~";
  return text;
}

std::string why_other_source(const ComparedRow& row) {
  if (row.entry.source.empty()) return {};
  return row.needs.empty() ? "could run on the first source, too; the config's choice"
                           : "needs " + row.needs;
}

// "name: text" of each method that has one, once.
template <typename TextOf>
std::string explained(const std::vector<ComparedRow>& rows, TextOf&& text_of, const char* what) {
  std::string text;
  std::vector<std::string> said;
  for (const ComparedRow& row : rows) {
    const std::string own = text_of(row);
    const std::string line = fmt::format("      {}: {}\n", row_name(row), own);
    if (own.empty() || std::find(said.begin(), said.end(), line) != said.end()) continue;
    text += line;
    said.push_back(line);
  }
  return text.empty() ? "" : fmt::format("  {}\n{}", what, text);
}

}  // namespace

const std::string& row_name(const ComparedRow& row) {
  return row.entry.label.empty() ? row.measured.pipeline : row.entry.label;
}

int memory_class(const ComparedRow& row) {
  const double bytes = row.measured.memory_per_token;
  if (bytes <= 0) return 0;
  const double fewer = std::log2(dense_row_bytes(row.head_dim) / bytes);
  return fewer <= 0 ? 0 : std::min(1 + static_cast<int>(fewer), kSmallestClass);
}

std::string memory_class_name(int memory_class, int head_dim) {
  const double dense = dense_row_bytes(head_dim);
  const auto bytes = [&](int halvings) { return dense / (1 << halvings); };
  if (memory_class == 0) return fmt::format("as fp16 or larger: {:g} bytes/token or more", dense);
  if (memory_class == kSmallestClass) {
    return fmt::format("more than {} times smaller than fp16: below {:g} bytes/token",
                       1 << (kSmallestClass - 1), bytes(kSmallestClass - 1));
  }
  return fmt::format("{} to {} times smaller than fp16: {:g} to {:g} bytes/token",
                     1 << (memory_class - 1), 1 << memory_class, bytes(memory_class),
                     bytes(memory_class - 1));
}

std::optional<double> bytes_read(const ComparedRow& row) {
  const Measured& measured = row.measured;
  if (!measured.scan_bytes || !measured.attended_bytes) return std::nullopt;
  return *measured.scan_bytes + *measured.attended_bytes;
}

std::vector<bool> on_front(const std::vector<ComparedRow>& rows, bool of_class) {
  std::map<int, std::vector<size_t>> parts;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].competes && point_of(rows[i])) {
      parts[of_class ? memory_class(rows[i]) : 0].push_back(i);
    }
  }
  std::vector<bool> on(rows.size(), false);
  for (const auto& [part, members] : parts) {
    std::vector<ScatterPoint> points;
    for (size_t i : members) points.push_back(*point_of(rows[i]));
    const std::vector<bool> front = pareto_front(points);
    for (size_t i = 0; i < members.size(); ++i) on[members[i]] = front[i];
  }
  return on;
}

std::string league_table(const std::vector<ComparedRow>& rows, const TableStyle& style) {
  Table table({{"budget"},
               {"tokens\nselected"},
               {"bytes\n/token"},
               {"dropped\nmass"},
               {"recall"},
               {"selection\nerror"},
               {"output\nerror"},
               {"scan bytes\n/step"},
               {"bytes read\n/step"},
               {"us\n/step"},
               {"", Table::Align::kLeft}},
              "method");
  const std::vector<bool> front = on_front(rows, false), class_front = on_front(rows, true);
  for (const int memory : classes_of(rows)) {
    table.group(memory_class_name(memory, rows.front().head_dim));
    for (size_t i = 0; i < rows.size(); ++i) {
      const ComparedRow& row = rows[i];
      const Measured& m = row.measured;
      if (memory_class(row) != memory) continue;
      table.row({{m.budget ? std::to_string(*m.budget) : "all"},
                 whole_cell(m.tokens_selected),
                 number_cell(m.memory_per_token),
                 metric_cell(row, "dropped_mass"),
                 metric_cell(row, "recall"),
                 metric_cell(row, "selection_error"),
                 metric_cell(row, "output_error"),
                 whole_cell(m.scan_bytes),
                 whole_cell(bytes_read(row)),
                 micros_cell(step_seconds(m.step_s) / row.num_layers),
                 {front[i]         ? "PP"
                  : class_front[i] ? "P"
                                   : ""}},
                row_name(row) + marks(row.entry), row.competes);
    }
  }
  return table.text(style) +
         "\n"
         "  tokens selected: mean, beside pinned tokens and tail. Recall is of the best `budget` "
         "tokens, and who selects fewer,\n"
         "  as a top-p does, cannot find them all; dropped mass and errors are of what is attended "
         "to\n"
         "  bytes/token: pages in use, side tables and the selector's state, per encoded token "
         "(evicted ones too) and KV head;\n"
         "  left out are pinned tokens, tail and working memory, which do not grow with the "
         "context, and page tables\n"
         "  scan bytes, bytes read: of one KV head in one layer; read = scan and tokens attended "
         "to\n"
         "  us/step: append, select and attend of one layer\n"
         "  PP: on the Pareto front of output error and bytes read, P: on that of its class\n" +
         explained(rows, why_other_source, "[name]: run on the source of that name, given above:") +
         explained(
             rows, [](const ComparedRow& row) { return row.entry.fitted; },
             "+ trained or calibrated:") +
         explained(
             rows, [](const ComparedRow& row) { return row.entry.reconstruction; },
             "~ partly a reconstruction:");
}

std::string league_svg(const std::vector<ComparedRow>& rows, const std::string& title) {
  Scatter scatter{
      title, "bytes read per step, of one KV head in one layer", "output error", {}, {}};
  for (const int memory : classes_of(rows)) {
    std::map<std::pair<std::string, bool>, ScatterSeries> by_name;
    std::vector<std::pair<std::string, bool>> order;
    for (const ComparedRow& row : rows) {
      const auto point = point_of(row);
      if (memory_class(row) != memory || !point) continue;
      const std::pair key(row_name(row), row.competes);
      if (!by_name.contains(key)) {
        order.push_back(key);
        by_name[key] = {key.first, scatter.groups.size(), {}, row.competes};
      }
      by_name[key].points.push_back(*point);
    }
    if (order.empty()) continue;
    scatter.groups.push_back(memory_class_name(memory, rows.front().head_dim));
    for (const auto& key : order) scatter.series.push_back(std::move(by_name[key]));
  }
  return scatter_svg(scatter);
}

nlohmann::ordered_json league_json(const ComparedRow& row, bool on_front, bool on_class_front) {
  nlohmann::ordered_json json = {{"label", row_name(row)}};
  for (const auto& [name, text] :
       {std::pair("source_name", &row.entry.source), std::pair("fitted", &row.entry.fitted),
        std::pair("reconstruction", &row.entry.reconstruction)}) {
    if (!text->empty()) json[name] = *text;
  }
  json["memory_class"] = memory_class_name(memory_class(row), row.head_dim);
  json["competes"] = row.competes;
  json["on_front"] = on_front;
  json["on_class_front"] = on_class_front;
  json["us_per_step_and_layer"] = step_seconds(row.measured.step_s) * 1e6 / row.num_layers;
  return json;
}

}  // namespace sikv
