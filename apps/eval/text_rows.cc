#include "apps/eval/text_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "apps/common/show.h"
#include "framework/base/error.h"
#include "framework/config/pipeline_text.h"
#include "framework/model/evaluate.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;

EvalText cut(const EvalInput& text, const EvalFlags& flags) {
  const int64_t needed = flags.prompt + flags.steps + 1;
  if (std::ssize(text.tokens) < needed) {
    throw Error(
        "{} has {} tokens from --first-token on, but {} are needed (prompt {}, {} steps and the "
        "token after them): lower --prompt, --steps or --first-token",
        text.name, text.tokens.size(), needed, flags.prompt, flags.steps);
  }
  return {
      text.name, {text.tokens.begin(), text.tokens.begin() + needed}, flags.prompt, flags.steps};
}

Json row_of(const Evaluated& row, const Json& setup) {
  Json metrics = {{"nll", row.nll}, {"nll_added", row.nll_added}};
  if (row.kl) {
    metrics["kl"] = {{"mean", row.kl->mean}, {"p95", row.kl->p95}, {"p99", row.kl->p99}};
  }
  metrics["top1_same"] = row.top1_same;
  if (row.scans_per_step) metrics["scans_per_step"] = *row.scans_per_step;
  metrics["bytes_per_token"] = row.bytes_per_token;
  metrics["compression_total"] = row.compression_total;
  Json json = {{"pipeline", row.pipeline}, {"setup", setup}, {"budget", nullptr}};
  if (row.budget) json["budget"] = *row.budget;
  json["metrics"] = std::move(metrics);
  json["memory"] = memory_json(row.ledger);
  std::map<std::string, Summary> latency = row.step_s;
  latency["token"] = row.token_s;
  json["latency_us"] = latency_json({{"pipeline", row.prefill_s}}, latency);
  json["variants"] = variants_json(row.variants);
  json["counters"] = row.counters;
  json["bytes_read"] = bytes_read_json(row.scan_bytes, row.attended_bytes);
  return json;
}

// Rows of the table, by text.
struct Line {
  std::string text;
  Json row;
  bool competes;
};

Table::Cell metric_cell(const Json& metrics, const char* name, const char* format) {
  const auto found = metrics.find(name);
  if (found == metrics.end() || !found->is_number()) return {"-"};
  const double value = found->get<double>();
  return {fmt::format(fmt::runtime(format), value), value};
}

// By a selector and by attention; nothing where one of them is not known.
std::optional<double> bytes_read(const Json& row) {
  const Json read = row.value("bytes_read", Json::object());
  const Json scan = read.value("scan", Json()), attended = read.value("attended", Json());
  if (!scan.is_number() || !attended.is_number()) return std::nullopt;
  return scan.get<double>() + attended.get<double>();
}

std::string eval_table(const std::vector<Line>& lines, const TableStyle& style) {
  using enum Table::Align;
  using enum Table::Better;
  Table table({{"NLL"},
               {"added"},
               {"KL\nmean", kRight, kLower},
               {"\np95", kRight, kLower},
               {"\np99", kRight, kLower},
               {"top-1\nsame", kRight, kHigher},
               {"scans\n/step", kRight, kLower},
               {"bytes read\n/step", kRight, kLower},
               {"bytes\n/token", kRight, kLower},
               {"total\ncompr.", kRight, kHigher},
               {"pipeline\nms/token", kRight, kLower},
               {"model\nms/token", kRight, kLower}},
              "pipeline");
  std::string group;
  for (const auto& [text, row, competes] : lines) {
    const std::string title =
        row["budget"].is_null() ? text + ", no budget"
                                : fmt::format("{}, budget {}", text, row["budget"].get<int64_t>());
    if (title != group) table.group(group = title);
    const Json& metrics = row["metrics"];
    const Json& latency = row["latency_us"];
    const Json kl = metrics.value("kl", Json::object());
    const std::optional<double> read = bytes_read(row);
    double pipeline_us = 0;  // stages are not told apart in a graph
    for (const char* stage : {"append", "select", "attend"}) {
      if (latency.contains(stage)) pipeline_us += latency[stage]["median"].get<double>();
    }
    const auto millis = [](double us) { return Table::Cell{fmt::format("{:.2f}", us * 1e-3), us}; };
    table.row({metric_cell(metrics, "nll", "{:.4f}"), metric_cell(metrics, "nll_added", "{:+.4f}"),
               metric_cell(kl, "mean", "{:.4f}"), metric_cell(kl, "p95", "{:.4f}"),
               metric_cell(kl, "p99", "{:.4f}"), metric_cell(metrics, "top1_same", "{:.3f}"),
               metric_cell(metrics, "scans_per_step", "{:.2f}"),
               read ? number_cell(*read) : Table::Cell{"-"},
               number_cell(metrics["bytes_per_token"].get<double>()),
               number_cell(metrics["compression_total"].get<double>()),
               pipeline_us == 0 ? Table::Cell{"-"} : millis(pipeline_us),
               millis(latency["token"]["median"].get<double>())},
              row.value("label", row["pipeline"].get<std::string>()), competes);
  }
  return table.text(style);
}

class TextRows {
 public:
  explicit TextRows(EvalSession& session) : session_(session), flags_(session.flags()) {
    for (const EvalInput& input : session.inputs()) texts_.push_back(cut(input, flags_));
    session.check_pipelines(flags_.prompt + flags_.steps);
    for (const PipelineSpec& spec : session.pipelines()) note_pins(spec, flags_.prompt);
  }

  void run() {
    try {
      for (const EvalText& text : texts_) run(text);
    } catch (const Interrupted&) {
      report();
      note(fmt::format("stopped after {} rows{}", lines_.size(),
                       flags_.json.empty() ? "" : "; the same command goes on from there"));
      throw;
    }
    report();
  }

 private:
  Json setup(const EvalText& text) const {
    return {{"model", session_.model().config().name},
            {"weights", session_.model().step_bytes()},
            {"text", text.name},
            {"first_token", flags_.first_token},
            {"prompt", text.prompt},
            {"steps", text.steps},
            {"queries", flags_.queries},
            {"dtype", flags_.dtype},
            {"threads", session_.device().info().num_threads}};
  }

  void run(const EvalText& text) {
    const Json setup = this->setup(text);
    std::optional<Evaluation> evaluation;  // made when the first row needs it
    const auto ready = [&]() -> Evaluation& {
      if (!evaluation) {
        evaluation.emplace(session_.model(), text, session_.dtype(), flags_.queries,
                           session_.all_queries(), session_.registry(), session_.device());
      }
      return *evaluation;
    };
    const auto row = [&](const PipelineSpec& spec, auto&& measure) -> Json {
      const Json* known = session_.file().find(pipeline_text(spec, session_.registry()), setup);
      kept_ += known != nullptr;
      if (known != nullptr) return *known;
      Json measured = row_of(measure(), setup);
      if (!spec.entry.label.empty()) measured["label"] = spec.entry.label;
      return session_.file().add(measured);
    };
    lines_.push_back({text.name, row(session_.dense(), [&] { return ready().dense(); }), false});
    for (const PipelineSpec& spec : session_.pipelines()) {
      const auto measure = [&] { return ready().run(spec, session_.device_of(spec)); };
      lines_.push_back({text.name, row(spec, measure), true});
    }
  }

  void report() const {
    if (kept_ > 0) note(fmt::format("{} rows were there already and were kept", kept_));
    if (lines_.empty()) return;
    std::vector<Line> lines = lines_;
    std::stable_sort(lines.begin(), lines.end(), [&](const Line& a, const Line& b) {
      const auto rank = [](const Line& line) {
        return std::pair(line.text, line.row["budget"].is_null()
                                        ? int64_t{-1}
                                        : line.row["budget"].get<int64_t>());
      };
      return rank(a) < rank(b);
    });
    print(
        fmt::format("{}: prompt of {} tokens, {} teacher-forced steps\n\n{}\n"
                    "* best of its group, dense aside; KL: nats to dense, p99: 1 % of the steps "
                    "are worse; bytes "
                    "read: by one\n  KV head of one layer; times: medians, all layers\n",
                    session_.model().config().name, flags_.prompt, flags_.steps,
                    eval_table(lines, TableStyle::of(stdout))));
  }

  EvalSession& session_;
  const EvalFlags& flags_;
  std::vector<EvalText> texts_;
  std::vector<Line> lines_;
  int kept_ = 0;
};

}  // namespace

void evaluate_texts(EvalSession& session) { TextRows(session).run(); }

}  // namespace sikv
