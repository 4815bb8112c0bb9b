#include "apps/run/run.h"

#include <fmt/format.h>

#include "apps/common/show.h"
#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/experiment/measure.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

struct RunFlags {
  ConfigFlags config;
  std::filesystem::path file, json;
};

std::string metrics_table(const Measured& measured, const TableStyle& style) {
  Table table({{"quality", Table::Align::kLeft}, {"mean"}, {"p95"}, {"p99"}});
  for (const auto& [name, summary] : measured.metrics) {
    table.row({{spaced(name)},
               share_cell(summary.mean),
               share_cell(summary.p95),
               share_cell(summary.p99)});
  }
  return table.text(style);
}

std::string latency_table(const Measured& measured, const TableStyle& style) {
  Table table(
      {{"latency, all layers", Table::Align::kLeft}, {"mean us"}, {"median us"}, {"p95 us"}});
  for (const auto& [stage, seconds] : measured.prefill_s) {
    table.row({{"prefill: " + stage}, micros_cell(seconds), {""}, {""}});
  }
  for (const auto& [stage, summary] : measured.step_s) {
    table.row({{"step: " + stage},
               micros_cell(summary.mean),
               micros_cell(summary.median),
               micros_cell(summary.p95)});
  }
  table.row({{"step, sum"}, micros_cell(step_seconds(measured.step_s)), {""}, {""}});
  return table.text(style);
}

std::string counters_table(const Measured& measured, const TableStyle& style) {
  Table table({{"counted by the selector", Table::Align::kLeft}, {"count"}});
  for (const auto& [name, count] : measured.counters) {
    table.row({{name}, number_cell(count)});
  }
  return table.text(style);
}

std::string report(const Source& source, const Measured& measured, const TableStyle& style) {
  std::vector<std::string> variants;
  for (const ChosenVariant& v : measured.variants) {
    variants.push_back(fmt::format("{} {} ({})", v.role, v.id, v.variant));
  }
  std::string text =
      fmt::format("{}\n  on   {}\n  ran  {}\n", measured.pipeline, source.text, join(variants));
  if (!measured.metrics.empty()) text += "\n" + metrics_table(measured, style);
  if (measured.tokens_selected && measured.budget && measured.metrics.contains("recall")) {
    text += fmt::format("  recall: of the best {} tokens; {:.4g} were selected, on average\n",
                        *measured.budget, *measured.tokens_selected);
  }
  text += "\n" + memory_table(measured.ledger, measured.bytes_per_token, style);
  text += fmt::format(
      "  bytes/token: pages in use, per encoded token, evicted ones too; {:.4g} with side tables "
      "and the selector's\n"
      "  state, as tables by memory count; pinned tokens and tail do not grow with the context\n",
      measured.memory_per_token);
  text += fmt::format(
      "  smaller than fp16: a stored token {:.2f} times, the whole cache {:.2f} times (of all "
      "tokens, "
      "evicted ones too)\n",
      measured.compression, measured.compression_total);
  text += "\n" + latency_table(measured, style);
  if (!measured.counters.empty()) text += "\n" + counters_table(measured, style);
  return text;
}

void run(const RunFlags& flags, const std::vector<std::string>& command_line) {
  if (!flags.json.empty()) check_result_path(flags.json);
  Registry registry = flags.config.open_registry();
  const Config config = flags.config.load(flags.file, registry);
  const auto pipelines = expand_budgets(config, registry);
  if (pipelines.size() != 1) {
    const std::string left = left_of_sweep(config);
    throw Error("{} gives {} pipelines, budgets counted, and run takes one: use sikv compare{}{}",
                flags.file.string(), pipelines.size(),
                left.empty() ? "" : ", or sikv throughput, which takes " + left + ", too",
                config.budgets.size() > 1 ? ", or one budget: --set budgets=[N]" : "");
  }
  note_left_of_sweep(config);
  Devices devices(config.threads);
  Device& device = devices.open(pipelines[0], registry);
  const Source source = load_source(on_source_of(config, pipelines[0]));
  note_pins(pipelines[0], source.prompt);
  ExactReference exact(source, device);
  const Measured measured =
      measure_pipeline(pipelines[0], registry, device, source, exact, config.measure);
  print(report(source, measured, TableStyle::of(stdout)));
  note_surprises(config, source, measured);
  if (flags.json.empty()) return;
  write_json(flags.json, {{"environment", environment(command_line, device)},
                          {"source", source.text},
                          {"rows", {row_json(measured)}}});
}

}  // namespace

Command add_run(CLI::App& app, const std::vector<std::string>& command_line) {
  CLI::App* command = app.add_subcommand("run", "Measures one pipeline: bytes, time, quality");
  auto flags = std::make_shared<RunFlags>();
  add_config_argument(*command, flags->file);
  add_output_option(*command, "--json", flags->json, "writes the row there, too");
  flags->config.add_to(*command);
  command->footer(examples({
      "sikv run configs/self_index.yaml",
      "sikv run configs/rot_lm_rerank.yaml --set pipeline.selector.budget=384 --json row.json",
      "sikv run configs/self_index.yaml --force selector=ref --threads 1",
  }));
  return {command, [flags, &command_line] { run(*flags, command_line); }};
}

}  // namespace sikv
