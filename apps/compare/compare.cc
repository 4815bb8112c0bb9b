#include "apps/compare/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "apps/common/show.h"
#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_parts.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/measure.h"
#include "framework/pipeline/pipeline.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

// Selectors that bound what any other can reach. They stand beside every comparison and compete
// with nobody.
constexpr const char* kUpperBound = "oracle";
constexpr const char* kLowerBound = "random";

struct CompareFlags {
  ConfigFlags config;
  std::vector<std::filesystem::path> files;
  std::filesystem::path json, csv;
};

bool is_bound(const PipelineSpec& spec) {
  return spec.selector.id == kUpperBound || spec.selector.id == kLowerBound;
}

bool same_source(const Config& a, const Config& b) {
  const auto synthetic = [](const Config& config) {
    const SyntheticSpec spec = config.source.synthetic.value_or(SyntheticSpec());
    return std::tuple(config.source.synthetic.has_value(), spec.kind, spec.context, spec.batch,
                      spec.batch_max, spec.dtype, spec.seed);
  };
  const auto model = [](const Config& config) {
    const ModelSpec spec = config.model.value_or(ModelSpec());
    return std::tuple(spec.layers, spec.query_heads, spec.kv_heads, spec.head_dim, spec.rope_theta);
  };
  std::error_code missing;
  const bool same_trace = a.source.trace == b.source.trace ||
                          std::filesystem::equivalent(a.source.trace, b.source.trace, missing);
  return same_trace && synthetic(a) == synthetic(b) &&
         (!a.source.synthetic || model(a) == model(b)) && a.source.layers == b.source.layers &&
         a.source.prompt == b.source.prompt && a.source.steps == b.source.steps &&
         a.measure.steps == b.measure.steps && a.measure.warmup == b.measure.warmup;
}

// Rows of several configs, in order, each printed form once.
class Plan {
 public:
  explicit Plan(const Registry& registry) : registry_(registry) {}

  void add(const PipelineSpec& spec) {
    if (seen_.insert(pipeline_text(spec, registry_)).second) specs_.push_back(spec);
  }

  // The oracle with the codecs of the first pipeline and random with exact K and V, at every budget
  // that occurs, unless a pipeline uses that selector at that budget already.
  void add_bounds() {
    const PipelineSpec first = specs_.front();
    std::vector<std::string> budgets;
    std::set<std::pair<std::string, std::string>> there;  // selector, budget
    for (const PipelineSpec& spec : specs_) {
      const std::string budget = budget_of(spec.selector);
      if (budget.empty()) continue;
      there.insert({spec.selector.id, budget});
      if (std::find(budgets.begin(), budgets.end(), budget) == budgets.end()) {
        budgets.push_back(budget);
      }
    }
    if (budgets.empty()) budgets.push_back(budget_of({kUpperBound, {}, {}}));
    for (const char* bound : {kUpperBound, kLowerBound}) {
      for (const std::string& budget : budgets) {
        if (there.contains({bound, budget})) continue;
        PipelineSpec spec = first;
        spec.force.clear();
        spec.device = "auto";
        spec.selector = {bound, {{"budget", budget}}, {}};
        spec.kernel = {"gather_attention", {}, {}};
        if (bound == kLowerBound) spec.keys = spec.values = {"fp16", {}, {}};
        add(spec);
      }
    }
  }

  const std::vector<PipelineSpec>& specs() const { return specs_; }

 private:
  // As written, or the default; empty for a selector without a budget.
  std::string budget_of(const PluginSpec& selector) const {
    const PluginSpec* const holder = budget_holder(selector, registry_);
    if (holder == nullptr) return {};
    for (const auto& [name, value] : holder->options) {
      if (name == "budget") return value;
    }
    return find_option(registry_.options(SIKV_SELECTOR, holder->id), "budget", holder->id)
        .default_value;
  }

  const Registry& registry_;
  std::vector<PipelineSpec> specs_;
  std::set<std::string> seen_;
};

struct Row {
  Measured measured;
  bool competes;
};

Table::Better better_of(const Summary& summary) {
  return summary.bad == BadSide::kLow ? Table::Better::kHigher : Table::Better::kLower;
}

std::string comparison_table(const std::vector<Row>& rows, const TableStyle& style) {
  std::map<std::string, Table::Better> metrics;
  std::set<std::optional<int64_t>> budgets;
  for (const Row& row : rows) {
    for (const auto& [name, summary] : row.measured.metrics) metrics[name] = better_of(summary);
    budgets.insert(row.measured.budget);
  }
  std::vector<Table::Column> columns;
  for (const auto& [name, better] : metrics) {
    columns.push_back({spaced(name) + "\nmean", Table::Align::kRight, better});
    columns.push_back({"\np99", Table::Align::kRight, better});
  }
  columns.push_back({"bytes\n/token", Table::Align::kRight, Table::Better::kLower});
  columns.push_back({"total\ncompr.", Table::Align::kRight, Table::Better::kHigher});
  columns.push_back({"us\n/step", Table::Align::kRight, Table::Better::kLower});
  Table table(std::move(columns), "pipeline");
  for (const auto& budget : budgets) {
    table.group(budget ? fmt::format("budget {}", *budget) : "no budget");
    for (const auto& [measured, competes] : rows) {
      if (measured.budget != budget) continue;
      std::vector<Table::Cell> cells;
      for (const auto& [name, better] : metrics) {
        const auto found = measured.metrics.find(name);
        const bool has = found != measured.metrics.end();
        cells.push_back(has ? share_cell(found->second.mean) : Table::Cell{"-"});
        cells.push_back(has ? share_cell(found->second.p99) : Table::Cell{"-"});
      }
      cells.push_back(number_cell(measured.bytes_per_token));
      cells.push_back(number_cell(measured.compression_total));
      cells.push_back(micros_cell(step_seconds(measured.step_s)));
      table.row(std::move(cells), measured.pipeline, competes);
    }
  }
  return table.text(style);
}

void report(const Source& source, const std::vector<Row>& rows) {
  print(
      fmt::format("{}\n\n{}\n"
                  "* best of its group, oracle and random aside; p99: 1 % of (layer, KV head, "
                  "step) are worse;\n"
                  "  us/step: append, select and attend of all layers, mean over the steps\n",
                  source.text, comparison_table(rows, TableStyle::of(stdout))));
}

void write_files(const CompareFlags& flags, const Source& source, const std::vector<Row>& rows,
                 const nlohmann::ordered_json& environment) {
  std::vector<Measured> measured;
  nlohmann::ordered_json json_rows = nlohmann::ordered_json::array();
  for (const Row& row : rows) {
    measured.push_back(row.measured);
    json_rows.push_back(row_json(row.measured));
  }
  if (!flags.json.empty()) {
    write_json(
        flags.json,
        {{"environment", environment}, {"source", source.text}, {"rows", std::move(json_rows)}});
  }
  if (!flags.csv.empty()) write_text(flags.csv, rows_csv(measured));
}

void compare(const CompareFlags& flags, const std::vector<std::string>& command_line) {
  if (!flags.json.empty() && flags.json == flags.csv) {
    throw Error("--json and --csv both name {}: give each its own file", flags.json.string());
  }
  for (const auto& output : {flags.json, flags.csv}) {
    if (!output.empty()) check_result_path(output);
  }
  Registry registry = flags.config.open_registry();
  Plan plan(registry);
  std::vector<Config> configs;
  for (const auto& file : flags.files) {
    configs.push_back(flags.config.load(file, registry));
    Config& first = configs.front();
    const Config& config = configs.back();
    if (!same_source(first, config)) {
      throw Error(
          "{} and {} differ in source or measured steps, so their rows cannot stand side by side: "
          "give both the same source, or set it with --set",
          first.file.string(), config.file.string());
    }
    for (const PipelineSpec& spec : expand_budgets(config, registry)) plan.add(spec);
    for (const std::string& metric : config.measure.metrics) {
      auto& metrics = first.measure.metrics;
      if (std::find(metrics.begin(), metrics.end(), metric) == metrics.end()) {
        metrics.push_back(metric);
      }
    }
  }
  plan.add_bounds();

  const Config& config = configs.front();
  Devices devices(config.threads);
  Device& host = devices.open("cpu");
  const Source source = load_source(config);
  ExactReference exact(source, host);
  // Parts that do not go together are found before the first row is measured.
  for (const PipelineSpec& spec : plan.specs()) {
    check_needs(
        Composition(spec, registry, devices.open(spec, registry), source.shape()).selector(),
        source.offer);
  }
  const auto block = environment(command_line, devices.open(plan.specs().front(), registry));
  std::vector<Row> rows;
  try {
    for (const PipelineSpec& spec : plan.specs()) {
      rows.push_back({measure_pipeline(spec, registry, devices.open(spec, registry), source, exact,
                                       config.measure),
                      !is_bound(spec)});
      // After every row: whatever stops it, minutes of work are not thrown away.
      write_files(flags, source, rows, block);
    }
  } catch (...) {
    if (!rows.empty()) report(source, rows);
    note(fmt::format("stopped after {} of {} rows", rows.size(), plan.specs().size()));
    throw;
  }
  report(source, rows);
  for (const Row& row : rows) note_surprises(config, source, row.measured);
}

}  // namespace

Command add_compare(CLI::App& app, const std::vector<std::string>& command_line) {
  CLI::App* command = app.add_subcommand(
      "compare", "Several pipelines and budgets on the same input, one table, with the bounds");
  auto flags = std::make_shared<CompareFlags>();
  command->add_option("CONFIG", flags->files, "YAML configs with the same source")->required();
  add_output_option(*command, "--json", flags->json, "writes all rows there, too");
  add_output_option(*command, "--csv", flags->csv, "the same as a spreadsheet");
  flags->config.add_to(*command);
  command->footer(examples({
      "sikv compare configs/reference.yaml --json reference.json",
      "sikv compare configs/self_index.yaml configs/quest.yaml --set 'budgets=[96, 384]'",
      "sikv compare configs/reference.yaml --set source.layers=[8] --csv layer8.csv",
  }));
  return {command, [flags, &command_line] { compare(*flags, command_line); }};
}

}  // namespace sikv
