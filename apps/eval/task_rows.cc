#include "apps/eval/task_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "apps/common/show.h"
#include "framework/base/error.h"
#include "framework/config/pipeline_text.h"
#include "framework/report/heat_map.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;

std::string percent(double share) { return fmt::format("{:.0f} %", 100 * share); }

Json row_of(const TaskRow& row, const Json& setup) {
  Json json = {{"pipeline", row.pipeline}, {"setup", setup},
               {"found", row.found},       {"asked", row.asked},
               {"shares", row.shares},     {"found_by_prompt", row.found_by_prompt},
               {"scans_per_step", nullptr}};
  if (row.scans_per_step) json["scans_per_step"] = *row.scans_per_step;
  json["bytes_per_token"] = row.bytes_per_token;
  json["latency_us"] = {{"token", {{"median", row.token_s * 1e6}}}};
  return json;
}

class TaskRows {
 public:
  explicit TaskRows(EvalSession& session) : session_(session), flags_(session.flags()) {
    for (const std::string& name : flags_.tasks) tasks_.push_back(parse_task(name));
    plan_ = flags_.plan;
    plan_.dtype = session.dtype();
    pipelines_ = {session.dense()};
    pipelines_.insert(pipelines_.end(), session.pipelines().begin(), session.pipelines().end());
    check();
  }

  void run() {
    try {
      for (const Task task : tasks_) {
        for (const int64_t length : flags_.lengths) run(task, length);
      }
    } catch (const Interrupted&) {
      report();
      note(fmt::format("stopped after {} rows{}", rows_.size(),
                       flags_.json.empty() ? "" : "; the same command goes on from there"));
      throw;
    }
    report();
  }

 private:
  // A prompt that cannot be made is found before the first is run.
  void check() {
    const int64_t context = session_.model().config().max_positions;
    int64_t longest = 0;
    for (const int64_t length : flags_.lengths) {
      for (const Task task : tasks_) {
        const TaskPrompt prompt = task_prompt(task, session_.tokenizer(), haystack(), length, 0, 1);
        if (length + prompt.answer_tokens > context) {
          throw Error(
              "prompts of {} tokens and answers of {} do not fit the context of {}, which is {}: "
              "lower --lengths",
              length, prompt.answer_tokens, session_.model().config().name, context);
        }
        longest = std::max(longest, length + prompt.answer_tokens);
      }
    }
    session_.check_pipelines(longest);
    plan_.all_queries = session_.all_queries();
  }

  std::span<const int32_t> haystack() const { return session_.inputs().front().tokens; }

  Json setup(Task task, int64_t length) const {
    return {{"task", task_name(task)},
            {"length", length},
            {"depths", plan_.cells(task)},
            {"prompts_per_depth", plan_.prompts_per_cell(task)},
            {"seed", plan_.seed},
            {"model", session_.model().config().name},
            {"weights", session_.model().step_bytes()},
            {"text", session_.inputs().front().name},
            {"first_token", flags_.first_token},
            {"dtype", flags_.dtype}};
  }

  void run(Task task, int64_t length) {
    const Json setup = this->setup(task, length);
    const auto known = [&](const PipelineSpec& spec) {
      return session_.file().find(pipeline_text(spec, session_.registry()), setup);
    };
    std::vector<PipelineSpec> missing;
    for (const PipelineSpec& spec : pipelines_) {
      if (known(spec) == nullptr) missing.push_back(spec);
    }
    kept_ += pipelines_.size() - missing.size();
    if (!missing.empty()) {
      const auto rows =
          run_task(task, length, plan_, session_.model(), session_.tokenizer(), haystack(), missing,
                   session_.registry(),
                   [&](const PipelineSpec& spec) -> Device& { return session_.device_of(spec); });
      for (const TaskRow& row : rows) session_.file().add(row_of(row, setup));
    }
    for (const PipelineSpec& spec : pipelines_) rows_.push_back(*known(spec));
  }

  // ---- what is shown ----------------------------------------------------------------------------

  static int64_t length_of(const Json& row) { return row["setup"]["length"].get<int64_t>(); }

  // By length. After Ctrl-C there may be none.
  std::vector<const Json*> rows_of(Task task, const PipelineSpec& spec) const {
    const std::string pipeline = pipeline_text(spec, session_.registry());
    std::vector<const Json*> rows;
    for (const Json& row : rows_) {
      if (row["pipeline"] == pipeline && row["setup"]["task"] == task_name(task)) {
        rows.push_back(&row);
      }
    }
    return rows;
  }

  std::string totals_table() const {
    using enum Table::Align;
    using enum Table::Better;
    Table table({{"found", kRight, kHigher},
                 {"asked"},
                 {"share", kRight, kHigher},
                 {"scans\n/step", kRight, kLower},
                 {"bytes\n/token", kRight, kLower},
                 {"model\nms/token", kRight, kLower}},
                "pipeline");
    for (const Task task : tasks_) {
      table.group(task_name(task));
      for (const PipelineSpec& spec : pipelines_) {
        const auto rows = rows_of(task, spec);
        if (rows.empty()) continue;
        int found = 0, asked = 0;
        double scans = 0, token_us = 0;
        for (const Json* row : rows) {
          found += (*row)["found"].get<int>();
          asked += (*row)["asked"].get<int>();
          scans += row->value("scans_per_step", Json()).is_null()
                       ? 0
                       : (*row)["scans_per_step"].get<double>();
          token_us += (*row)["latency_us"]["token"]["median"].get<double>();
        }
        const double lengths = static_cast<double>(rows.size());
        const double share = static_cast<double>(found) / asked;
        table.row({{std::to_string(found), double(found)},
                   {std::to_string(asked)},
                   share_cell(share),
                   scans == 0 ? Table::Cell{"-"}
                              : Table::Cell{fmt::format("{:.2f}", scans / lengths), scans},
                   number_cell(rows.back()->at("bytes_per_token").get<double>()),
                   {fmt::format("{:.1f}", token_us * 1e-3 / lengths), token_us}},
                  rows.front()->at("pipeline").get<std::string>(), &spec != pipelines_.data());
      }
    }
    return table.text(TableStyle::of(stdout));
  }

  // Lengths down, depths across.
  std::vector<HeatMap> grids() const {
    std::vector<HeatMap> maps;
    for (const Task task : tasks_) {
      for (const PipelineSpec& spec : pipelines_) {
        const auto rows = rows_of(task, spec);
        if (rows.empty()) continue;
        HeatMap map;
        map.title = task_name(task) + ": " + rows.front()->at("pipeline").get<std::string>();
        map.row_axis = "tokens";
        map.column_axis = has_depth(task) ? "depth" : "";
        for (int cell = 0; cell < plan_.cells(task); ++cell) {
          map.columns.push_back(has_depth(task) ? percent(plan_.depth(cell)) : "all");
        }
        for (const Json* row : rows) {
          map.rows.push_back(std::to_string(length_of(*row)));
          map.shares.push_back((*row)["shares"].get<std::vector<double>>());
        }
        maps.push_back(std::move(map));
      }
    }
    return maps;
  }

  static std::string grid_text(const HeatMap& map) {
    std::vector<Table::Column> columns;
    for (const std::string& column : map.columns) columns.push_back({column});
    Table table(std::move(columns), map.row_axis);
    table.group(map.title);
    for (size_t r = 0; r < map.rows.size(); ++r) {
      std::vector<Table::Cell> cells;
      for (const double share : map.shares[r]) cells.push_back({fmt::format("{:.2f}", share)});
      table.row(std::move(cells), map.rows[r]);
    }
    return table.text(TableStyle::of(stdout));
  }

  void report() const {
    if (kept_ > 0) note(fmt::format("{} rows were there already and were kept", kept_));
    if (rows_.empty()) return;
    print(fmt::format(
        "{}: answers found in {}\n\n{}\n* best of its group, dense aside; scans and "
        "times: means over lengths\n",
        session_.model().config().name, session_.inputs().front().name, totals_table()));
    const auto maps = grids();
    for (const HeatMap& map : maps) print("\n" + grid_text(map));
    if (!flags_.svg.empty()) write_text(flags_.svg, heat_map_svg(maps));
  }

  EvalSession& session_;
  const EvalFlags& flags_;
  TaskPlan plan_;
  std::vector<Task> tasks_;
  std::vector<PipelineSpec> pipelines_;  // dense first
  std::vector<Json> rows_;
  size_t kept_ = 0;
};

}  // namespace

void evaluate_tasks(EvalSession& session) { TaskRows(session).run(); }

}  // namespace sikv
