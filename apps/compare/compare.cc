#include "apps/compare/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>

#include "apps/common/row_file.h"
#include "apps/common/show.h"
#include "apps/compare/league.h"
#include "apps/compare/plan.h"
#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/measure.h"
#include "framework/pipeline/pipeline.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;

struct CompareFlags {
  ConfigFlags config;
  std::vector<std::filesystem::path> files;
  std::filesystem::path json, csv, svg;
};

bool same_trace(const SourceSpec& a, const SourceSpec& b) {
  std::error_code missing;
  return a.trace == b.trace || std::filesystem::equivalent(a.trace, b.trace, missing);
}

// The first field in which two configs differ that must agree for their rows to stand side by side;
// empty if none does.
std::string source_difference(const std::string& owner, const SourceSpec& a, const SourceSpec& b) {
  const std::pair<const char*, bool> fields[] = {{"trace", same_trace(a, b)},
                                                 {"layers", a.layers == b.layers},
                                                 {"judge", a.judge == b.judge},
                                                 {"prompt", a.prompt == b.prompt},
                                                 {"steps", a.steps == b.steps}};
  for (const auto& [name, same] : fields) {
    if (!same) return owner + "." + name;
  }
  return {};
}

std::string difference(const Config& a, const Config& b) {
  if (a.source.synthetic.has_value() != b.source.synthetic.has_value()) return "source";
  if (a.source.synthetic) {
    const SyntheticSpec &x = *a.source.synthetic, &y = *b.source.synthetic;
    const ModelSpec &m = *a.model, &n = *b.model;
    const std::pair<const char*, bool> fields[] = {
        {"source.synthetic.kind", x.kind == y.kind},
        {"source.synthetic.context", x.context == y.context},
        {"source.synthetic.batch", x.batch == y.batch && x.batch_max == y.batch_max},
        {"source.synthetic.dtype", x.dtype == y.dtype},
        {"source.synthetic.seed", x.seed == y.seed},
        {"model.layers", m.layers == n.layers},
        {"model.query_heads", m.query_heads == n.query_heads},
        {"model.kv_heads", m.kv_heads == n.kv_heads},
        {"model.head_dim", m.head_dim == n.head_dim},
        {"model.rope_theta", m.rope_theta == n.rope_theta}};
    for (const auto& [name, same] : fields) {
      if (!same) return name;
    }
  }
  std::string field = source_difference("source", a.source, b.source);
  for (const auto& [name, source] : b.sources) {
    const auto other = a.sources.find(name);
    if (!field.empty()) break;
    if (other != a.sources.end())
      field = source_difference("sources." + name, other->second, source);
  }
  if (!field.empty()) return field;
  if (a.measure.steps != b.measure.steps) return "measure.steps";
  return a.measure.warmup != b.measure.warmup ? "measure.warmup" : "";
}

Table::Better better_of(const Summary& summary) {
  return summary.bad == BadSide::kLow ? Table::Better::kHigher : Table::Better::kLower;
}

std::string budget_table(const std::vector<ComparedRow>& rows, const TableStyle& style) {
  std::map<std::string, Table::Better> metrics;
  std::set<std::optional<int64_t>> budgets;
  for (const ComparedRow& row : rows) {
    for (const auto& [name, summary] : row.measured.metrics) metrics[name] = better_of(summary);
    budgets.insert(row.measured.budget);
  }
  std::vector<Table::Column> columns;
  for (const auto& [name, better] : metrics) {
    columns.push_back({spaced(name) + "\nmean", Table::Align::kRight, better});
    columns.push_back({"\np99", Table::Align::kRight, better});
  }
  columns.push_back({"tokens\nselected"});
  columns.push_back({"bytes\n/token", Table::Align::kRight, Table::Better::kLower});
  columns.push_back({"total\ncompr.", Table::Align::kRight, Table::Better::kHigher});
  columns.push_back({"us\n/step", Table::Align::kRight, Table::Better::kLower});
  Table table(std::move(columns), "pipeline");
  for (const auto& budget : budgets) {
    table.group(budget ? fmt::format("budget {}", *budget) : "no budget");
    for (const ComparedRow& row : rows) {
      const Measured& measured = row.measured;
      if (measured.budget != budget) continue;
      std::vector<Table::Cell> cells;
      for (const auto& [name, better] : metrics) {
        const auto found = measured.metrics.find(name);
        const bool has = found != measured.metrics.end();
        cells.push_back(has ? share_cell(found->second.mean) : Table::Cell{"n/a"});
        cells.push_back(has ? share_cell(found->second.p99) : Table::Cell{"n/a"});
      }
      cells.push_back(whole_cell(measured.tokens_selected));
      cells.push_back(number_cell(measured.bytes_per_token));
      cells.push_back(number_cell(measured.compression_total));
      cells.push_back(micros_cell(step_seconds(measured.step_s)));
      const std::string source =
          row.entry.source.empty() ? "" : fmt::format(" [{}]", row.entry.source);
      table.row(std::move(cells), (row.competes ? row_name(row) : measured.pipeline) + source,
                row.competes);
    }
  }
  return table.text(style) +
         "* best of its group, oracle and random aside; p99: 1 % of (layer, KV head, "
         "step) are worse;\n"
         "  tokens selected: mean, beside pinned tokens and tail; recall: of the best `budget` "
         "tokens\n"
         "  bytes/token: pages in use, per encoded token, evicted ones too, and KV head; total "
         "compr.: of the whole cache\n"
         "  us/step: append, select and attend of all layers, mean over the steps\n";
}

// A comparison that is being made.
class Comparison {
 public:
  Comparison(const CompareFlags& flags, const std::vector<std::string>& command_line)
      : flags_(flags), registry_(flags.config.open_registry()), plan_(registry_) {
    check_outputs();
    read_configs();
    note_left_of_sweep(config());
    bounds_legend_ = plan_.add_bounds(budgets_);
    devices_.emplace(config().threads);
    drop_missing();
    load_sources();
    file_.emplace(flags.json, environment(command_line, devices_->open(specs_.front(), registry_)),
                  "comparison that can go on", "source");
    refuse_other_setups();
    rows_.resize(specs_.size());
  }

  void run() {
    try {
      take_known_rows();
      for (const auto& [name, source] : sources_) measure_all(name, source);
    } catch (...) {
      const std::vector<ComparedRow> rows = done();
      if (!rows.empty()) report(rows);
      note(fmt::format("stopped after {} of {} rows{}", rows.size(), specs_.size(),
                       flags_.json.empty() ? "" : "; the same command goes on from there"));
      throw;
    }
    const std::vector<ComparedRow> rows = done();
    report(rows);
    write_whole(rows);
    for (size_t i = 0; i < rows.size(); ++i) {
      note_surprises(config(), sources_.at(rows[i].entry.source), rows[i].measured);
    }
  }

 private:
  const Config& config() const { return configs_.front(); }

  void check_outputs() const {
    check_own_files({{"--json", flags_.json}, {"--csv", flags_.csv}, {"--svg", flags_.svg}});
    if (!flags_.csv.empty()) check_result_path(flags_.csv);
    if (!flags_.svg.empty()) check_replaceable(flags_.svg, "<svg", "a figure");
  }

  void read_configs() {
    for (const auto& file : flags_.files) {
      configs_.push_back(flags_.config.load(file, registry_));
      Config& first = configs_.front();
      const Config& config = configs_.back();
      if (const std::string field = difference(first, config); !field.empty()) {
        throw Error(
            "{} and {} differ in {}, so their rows cannot stand side by side: give both the same, "
            "or set it with --set",
            first.file.string(), config.file.string(), field);
      }
      first.sources.insert(config.sources.begin(), config.sources.end());
      for (const PipelineSpec& spec : expand_budgets(config, registry_)) plan_.add(spec);
      for (const std::string& budget : config.budgets) {
        if (std::find(budgets_.begin(), budgets_.end(), budget) == budgets_.end()) {
          budgets_.push_back(budget);
        }
      }
      for (const std::string& metric : config.measure.metrics) {
        auto& metrics = first.measure.metrics;
        if (std::find(metrics.begin(), metrics.end(), metric) == metrics.end()) {
          metrics.push_back(metric);
        }
      }
    }
  }

  // Pipelines whose trace is still to be made are left out, and named.
  void drop_missing() {
    std::map<std::string, std::vector<std::string>> skipped;
    std::map<std::string, SourceSpec> missing;
    for (const PipelineSpec& spec : plan_.specs()) {
      const SourceSpec& source = source_of(config(), spec);
      if (!source.missing) {
        specs_.push_back(spec);
        continue;
      }
      missing.try_emplace(spec.entry.source, source);
      const std::string name =
          spec.entry.label.empty() ? pipeline_text(spec, registry_) : spec.entry.label;
      auto& names = skipped[spec.entry.source];
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
    for (const auto& [source, names] : skipped) {
      const SourceSpec& spec = missing.at(source);
      note(fmt::format("left out: {}: they run on {}, which is not there; {} makes it", join(names),
                       spec.trace.string(), spec.make));
      Json entry = {{"make", spec.make}, {"labels", names}};
      if (!source.empty()) entry["source"] = source;
      skipped_.push_back(std::move(entry));
    }
    if (specs_.empty()) {
      throw Error("no pipeline is left: make the trace that they need");
    }
  }

  void load_sources() {
    for (const PipelineSpec& spec : specs_) {
      const std::string& name = spec.entry.source;
      if (!sources_.contains(name)) {
        sources_[name] = load_source(on_source_of(config(), spec));
      }
      // Parts that do not go together are found before the first row is measured.
      const Source& source = sources_.at(name);
      const Composition composition(spec, registry_, devices_->open(spec, registry_),
                                    source.shape(), source.layer_numbers());
      check_needs(composition.selector(), source.offer);
      needs_.push_back(join(needs_of(composition.selector())));
      note_pins(spec, source.prompt);
    }
  }

  Json setup(const Source& source) const {
    return {{"source", source.text},
            {"warmup", config().measure.warmup},
            {"steps", config().measure.steps},
            {"metrics", config().measure.metrics}};
  }

  // Empty if the row was measured as those of one of the sources are; else the field that differs,
  // as in a config.
  std::string other_setup(const Json& row) const {
    const Json& there = row["setup"];
    for (const auto& [name, source] : sources_) {
      const Json here = setup(source);
      if (there["source"] != here["source"]) continue;
      for (const char* field : {"warmup", "steps", "metrics"}) {
        const Json old = there.value(field, Json());
        if (old == here[field]) continue;
        return fmt::format("measure.{} is {} there and {} here", field, old.dump(),
                           here[field].dump());
      }
      return {};
    }
    return fmt::format("source is '{}' there", there["source"].get<std::string>());
  }

  // Rows that cannot stand beside those to be measured are not thrown away.
  void refuse_other_setups() const {
    std::string first;
    int others = 0;
    for (const Json& row : file_->rows()) {
      const std::string other = other_setup(row);
      if (other.empty()) continue;
      if (others++ == 0) first = other;
    }
    if (others == 0) return;
    throw Error("{} holds {} row{} measured otherwise ({}): name another file, or remove it",
                flags_.json.string(), others, others == 1 ? "" : "s", first);
  }

  ComparedRow row_of(size_t i, Measured measured) const {
    const PipelineSpec& spec = specs_[i];
    const Source& source = sources_.at(spec.entry.source);
    return {std::move(measured),
            spec.entry,
            needs_[i],
            !is_bound(spec),
            static_cast<int>(source.layers.size()),
            source.head_dim};
  }

  void take_known_rows() {
    size_t known = 0;
    for (size_t i = 0; i < specs_.size(); ++i) {
      const Source& source = sources_.at(specs_[i].entry.source);
      const Json* row = file_->find(pipeline_text(specs_[i], registry_), setup(source));
      if (row == nullptr) continue;
      rows_[i] = row_of(i, read_row(*row));
      ++known;
    }
    if (known > 0) {
      note(
          fmt::format("{} of {} rows are those of {}", known, specs_.size(), flags_.json.string()));
    }
  }

  Measured read_row(const Json& row) const {
    try {
      return measured_of(row);
    } catch (const Json::exception& error) {
      throw Error("{}: a row is damaged ({}); remove the file", flags_.json.string(), error.what());
    }
  }

  // Rows of one source at a time: its exact attention is kept meanwhile.
  void measure_all(const std::string& name, const Source& source) {
    std::optional<ExactReference> exact;
    for (size_t i = 0; i < specs_.size(); ++i) {
      const PipelineSpec& spec = specs_[i];
      if (spec.entry.source != name || rows_[i]) continue;
      if (!exact) exact.emplace(source, devices_->open("cpu"));
      rows_[i] = row_of(i, measure_pipeline(spec, registry_, devices_->open(spec, registry_),
                                            source, *exact, config().measure));
      // After every row: whatever stops it, minutes of work are not thrown away.
      write_partial(*rows_[i]);
    }
  }

  std::vector<ComparedRow> done() const {
    std::vector<ComparedRow> rows;
    for (const auto& row : rows_) {
      if (row) rows.push_back(*row);
    }
    return rows;
  }

  std::filesystem::path partial_csv() const { return flags_.csv.string() + ".partial"; }

  Json row_with_setup(const ComparedRow& row) const {
    Json json = row_json(row.measured);
    if (!row.entry.label.empty()) json["label"] = row.entry.label;
    json["setup"] = setup(sources_.at(row.entry.source));
    return json;
  }

  // With what a table by memory says of them.
  std::vector<Json> json_of(const std::vector<ComparedRow>& rows) const {
    std::vector<Json> json;
    const std::vector<bool> front = on_front(rows, false), class_front = on_front(rows, true);
    for (size_t i = 0; i < rows.size(); ++i) {
      json.push_back(row_with_setup(rows[i]));
      if (config().group_by == GroupBy::kMemory) {
        json.back().update(league_json(rows[i], front[i], class_front[i]));
      }
    }
    return json;
  }

  void write_partial(const ComparedRow& row) {
    const std::vector<ComparedRow> rows = done();
    file_->head() = {{"source", sources_.begin()->second.text},
                     {"partial", fmt::format("{} of {} rows", rows.size(), specs_.size())}};
    file_->add(row_with_setup(row));
    if (!flags_.csv.empty()) write_text(partial_csv(), rows_csv(json_of(rows)));
  }

  void write_whole(const std::vector<ComparedRow>& rows) {
    file_->head() = {{"source", sources_.begin()->second.text}};
    if (!skipped_.empty()) file_->head()["left_out"] = skipped_;
    const std::vector<Json> json = json_of(rows);
    file_->finish(json);
    if (const size_t more = file_->rows().size() - json.size(); more > 0) {
      note(fmt::format("{} keeps {} row{} of other pipelines", flags_.json.string(), more,
                       more == 1 ? "" : "s"));
    }
    if (!flags_.csv.empty()) {
      write_text(flags_.csv, rows_csv(json));
      std::error_code not_there;
      std::filesystem::remove(partial_csv(), not_there);
    }
    if (!flags_.svg.empty()) {
      write_text(flags_.svg, league_svg(rows, sources_.begin()->second.text));
      note_undrawn(rows);
    }
  }

  static void note_undrawn(const std::vector<ComparedRow>& rows) {
    std::vector<std::string> undrawn;
    for (const ComparedRow& row : rows) {
      if (bytes_read(row) || (!undrawn.empty() && undrawn.back() == row_name(row))) continue;
      undrawn.push_back(row_name(row));
    }
    if (!undrawn.empty()) {
      note(fmt::format("not in the figure, because their selectors do not count scan_bytes: {}",
                       join(undrawn)));
    }
  }

  void report(const std::vector<ComparedRow>& rows) const {
    const TableStyle style = TableStyle::of(stdout);
    std::string text;
    for (const auto& [name, source] : sources_) {
      text += name.empty() ? source.text + "\n" : fmt::format("[{}] {}\n", name, source.text);
    }
    print(text + "\n" +
          (config().group_by == GroupBy::kMemory ? league_table(rows, style)
                                                 : budget_table(rows, style)) +
          bounds_legend_);
  }

  const CompareFlags& flags_;
  Registry registry_;
  Plan plan_;
  std::vector<Config> configs_;
  std::vector<std::string> budgets_;  // `budgets` of all configs
  std::string bounds_legend_;
  std::optional<Devices> devices_;
  std::vector<PipelineSpec> specs_;        // of those whose source is there
  std::vector<std::string> needs_;         // as specs_
  std::map<std::string, Source> sources_;  // by name; "" comes first
  std::optional<RowFile> file_;
  std::vector<std::optional<ComparedRow>> rows_;  // as specs_
  Json skipped_ = Json::array();
};

}  // namespace

Command add_compare(CLI::App& app, const std::vector<std::string>& command_line) {
  CLI::App* command = app.add_subcommand(
      "compare", "Several pipelines and budgets on the same input, one table, with the bounds");
  auto flags = std::make_shared<CompareFlags>();
  command->add_option("CONFIG", flags->files, "YAML configs with the same source")->required();
  add_output_option(*command, "--json", flags->json,
                    "writes all rows there, too, and takes those it has from there; what it has of "
                    "other pipelines stays, and rows of another source or measure are refused");
  add_output_option(*command, "--csv", flags->csv, "the same as a spreadsheet");
  add_output_option(*command, "--svg", flags->svg, "draws output error against bytes read");
  flags->config.add_to(*command);
  command->footer(examples({
      "sikv compare configs/reference.yaml --json reference.json",
      "sikv compare configs/self_index.yaml configs/quest.yaml --set 'budgets=[96, 384]'",
      "sikv compare configs/reference.yaml --set source.layers=[11] --csv layer11.csv",
      "sikv compare configs/league.yaml --json league.json --svg league.svg",
  }));
  return {command, [flags, &command_line] { Comparison(*flags, command_line).run(); }};
}

}  // namespace sikv
