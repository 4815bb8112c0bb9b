#include "apps/throughput/throughput.h"

#include <fmt/format.h>

#include <set>

#include "apps/common/show.h"
#ifdef SIKV_HAS_MODEL
#include "apps/throughput/model_sweep.h"
#endif
#include "apps/throughput/sweep_file.h"
#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/throughput.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;

// What every sparse number stands beside. Nothing is pinned: dense attention reads all tokens.
constexpr const char* kDense = "fp16+fp16 > full(pinned=0) > dense_attention";
// More sequences than this are not tried for `batch: max`.
constexpr int kLargestBatch = 1 << 16;
// Of rows whose steps read the model's weights, too.
constexpr const char* kWholeRate = "whole_step_tokens_per_s";

struct ThroughputFlags {
  ConfigFlags config;
  std::filesystem::path file, json;
  uint64_t memory = 0;
  std::string model, weights = "fp16";  // whole-model sweep
};

// One cell of the sweep; no batch = the largest that fits.
struct Case {
  int64_t context;
  std::optional<int> batch;

  Json asked() const { return batch ? Json(*batch) : Json("max"); }
};

class Sweep {
 public:
  Sweep(const ThroughputFlags& flags, const Config& config, const Registry& registry,
        Device& device, Json environment)
      : registry_(registry),
        bench_(config, registry, device, flags.memory),
        file_(flags.json, std::move(environment)),
        specs_(expand_budgets(config, registry)),
        dense_(parse_pipeline(kDense, registry)),
        on_gpu_(device.is_cuda()) {
    dense_.device = config.pipelines.front().device;
    const SyntheticSpec& synthetic = *config.source.synthetic;
    for (const int64_t context : synthetic.context) {
      if (synthetic.batch_max) {
        cases_.push_back({context, std::nullopt});
        continue;
      }
      for (const int batch : synthetic.batch) cases_.push_back({context, batch});
    }
    const ModelSpec& model = *config.model;
    setup_ = {{"layers", model.layers},
              {"query_heads", model.query_heads},
              {"kv_heads", model.kv_heads},
              {"head_dim", model.head_dim},
              {"kind", synthetic.kind},
              {"dtype", synthetic.dtype},
              {"seed", synthetic.seed},
              {"steps", bench_.steps()},
              {"warmup", bench_.warmup()},
              {"threads", device.info().num_threads},
              {"memory_limit", flags.memory},
              {"tokens_per_s", on_gpu_ ? "batch / mean step, append included"
                                       : "batch / (mean select + mean attend)"}};
    if (on_gpu_) setup_["weight_bytes"] = bench_.weight_bytes();
  }

  // Everything that cannot fit is refused before anything is measured.
  void check() {
    for (const Case& c : cases_) {
      for (const PipelineSpec& spec : specs_) {
        if (file_.find(key(spec, c)) == nullptr) {
          bench_.check_fits(spec, c.context, c.batch.value_or(1));
        }
      }
    }
  }

  void run() {
    for (const Case& c : cases_) {
      const std::string group = fmt::format("context {}, batch {}", c.context,
                                            c.batch ? std::to_string(*c.batch) : "max");
      std::set<int> dense_batches;
      for (const PipelineSpec& spec : specs_) {
        const Json* row = file_.find(key(spec, c));
        if (row == nullptr) row = measure(spec, c);
        kept_ += file_.was_read(*row);
        ++finished_;
        lines_.push_back({group, *row, true});
        if (is_dense(spec)) dense_batches.insert((*row)["batch"].get<int>());
      }
      // What the ratios refer to, where it is not a pipeline of the sweep itself.
      for (size_t i = lines_.size() - specs_.size(), end = lines_.size(); i < end; ++i) {
        const Json dense = lines_[i].row["dense"];
        if (dense.is_null() || !dense_batches.insert(dense["batch"].get<int>()).second) continue;
        const Json* row = file_.find(key(dense_, {c.context, dense["batch"].get<int>()}));
        if (row != nullptr) lines_.push_back({group, *row, false});
      }
    }
  }

  // Rows of the table, in groups; those that do not compete are dense attention.
  struct Line {
    std::string group;
    Json row;
    bool competes;
  };
  const std::vector<Line>& lines() const { return lines_; }
  size_t planned() const { return cases_.size() * specs_.size(); }
  size_t kept() const { return kept_; }
  size_t finished() const { return finished_; }
  const Json& setup() const { return setup_; }
  bool on_gpu() const { return on_gpu_; }

 private:
  Json key(const PipelineSpec& spec, const Case& c) const {
    return {{"pipeline", pipeline_text(spec, registry_)},
            {"context", c.context},
            {"batch_asked", c.asked()},
            {"setup", setup_}};
  }

  bool is_dense(const PipelineSpec& spec) const {
    return pipeline_text(spec, registry_) == pipeline_text(dense_, registry_);
  }

  const Json* measure(const PipelineSpec& spec, const Case& c) {
    const int batch = c.batch ? *c.batch : bench_.largest_batch(spec, c.context, kLargestBatch);
    // First, so that whatever is interrupted later can use it.
    const Json dense = is_dense(spec) ? Json() : dense_beside(c.context, batch);
    Json row = key(spec, c);
    fill(row, bench_.measure(spec, c.context, batch));
    row["dense"] = dense;
    row["ratio_to_dense"] = nullptr;
    if (is_dense(spec)) row["ratio_to_dense"] = 1.0;
    if (!dense.is_null()) {
      const auto ratio = [&](const char* rate) {
        return row[rate].get<double>() / dense[rate].get<double>();
      };
      row["ratio_to_dense"] = ratio("attention_tokens_per_s");
      if (row.contains(kWholeRate)) row["whole_step_ratio_to_dense"] = ratio(kWholeRate);
    }
    return &file_.add(std::move(row));
  }

  // Dense attention at `batch`, or at the largest batch that fits; null where not one does.
  Json dense_beside(int64_t context, int batch) {
    const int fitting = bench_.largest_batch(dense_, context, batch);
    if (fitting == 0) return nullptr;
    const Case c{context, fitting};
    const Json* row = file_.find_here(key(dense_, c));
    if (row == nullptr) row = measure(dense_, c);
    Json dense = {{"batch", fitting},
                  {"same_batch", fitting == batch},
                  {"memory_bytes", (*row)["memory"]["total"]},
                  {"attention_tokens_per_s", (*row)["attention_tokens_per_s"]}};
    if (row->contains(kWholeRate)) dense[kWholeRate] = (*row)[kWholeRate];
    return dense;
  }

  static void fill(Json& row, const Throughput& measured) {
    row["batch"] = measured.batch;
    row["budget"] = nullptr;
    if (measured.budget) row["budget"] = *measured.budget;
    row["metrics"] = {{"bytes_per_token", measured.bytes_per_token},
                      {"compression", measured.compression},
                      {"compression_total", measured.compression_total}};
    row["memory"] = memory_json(measured.ledger);
    row["memory_growth"] = measured.memory_growth;
    row["latency_us"] = latency_json(measured.prefill_s, measured.step_s);
    row["attention_tokens_per_s"] = measured.batch / attention_seconds(measured.step_s);
    if (measured.whole_step_s) {
      row["whole_step_us"] = measured.whole_step_s->mean * 1e6;
      row[kWholeRate] = measured.batch / measured.whole_step_s->mean;
    }
    row["variants"] = variants_json(measured.variants);
  }

  const Registry& registry_;
  ThroughputBench bench_;
  SweepFile file_;
  std::vector<PipelineSpec> specs_;
  PipelineSpec dense_;
  bool on_gpu_;
  std::vector<Case> cases_;
  Json setup_;
  std::vector<Line> lines_;
  size_t finished_ = 0, kept_ = 0;
};

std::string ratio_text(const Json& row) {
  if (row["ratio_to_dense"].is_null()) return "dense does not fit";
  std::string text = fmt::format("{:.2f}x", row["ratio_to_dense"].get<double>());
  const Json& dense = row["dense"];
  if (!dense.is_null() && !dense["same_batch"].get<bool>()) {
    text += fmt::format(" (dense at {})", dense["batch"].get<int>());
  }
  return text;
}

std::string sweep_table(const Sweep& sweep, const TableStyle& style) {
  using enum Table::Align;
  using enum Table::Better;
  const std::vector<const char*> stages =
      sweep.on_gpu() ? std::vector{"step"} : std::vector{"append", "select", "attend"};
  const bool weights = sweep.on_gpu() && sweep.setup()["weight_bytes"].get<uint64_t>() > 0;
  std::vector<Table::Column> columns = {{"batch", kRight, kHigher},
                                        {"KV\nmemory"},
                                        {sweep.on_gpu() ? "GPU\ngrowth" : "process\ngrowth"},
                                        {"bytes\n/token", kRight, kLower},
                                        {"prefill\nms", kRight, kLower}};
  for (const char* stage : stages) {
    columns.push_back({std::string(stage) + "\nus", kRight, kLower});
  }
  columns.push_back({"attention\ntokens/s", kRight, kHigher});
  columns.push_back({"to\ndense"});
  if (weights) {
    columns.push_back({"whole step\ntokens/s", kRight, kHigher});
    columns.push_back({"to\ndense"});
  }
  Table table(std::move(columns), "pipeline");
  std::string group;
  for (const auto& [title, row, competes] : sweep.lines()) {
    if (title != group) table.group(group = title);
    const Json& latency = row["latency_us"];
    double prefill_us = 0;
    for (const Json& stage : latency["prefill"]) prefill_us += stage.get<double>();
    std::vector<Table::Cell> cells = {number_cell(row["batch"].get<double>()),
                                      bytes_cell(row["memory"]["total"].get<uint64_t>()),
                                      bytes_cell(row["memory_growth"].get<uint64_t>()),
                                      number_cell(row["metrics"]["bytes_per_token"].get<double>()),
                                      number_cell(prefill_us * 1e-3)};
    for (const char* stage : stages) {
      cells.push_back(micros_cell(latency[stage]["mean"].get<double>() * 1e-6));
    }
    cells.push_back(number_cell(row["attention_tokens_per_s"].get<double>()));
    cells.push_back({ratio_text(row)});
    if (weights) {
      const Json ratio = row.value("whole_step_ratio_to_dense", Json());
      cells.push_back(number_cell(row[kWholeRate].get<double>()));
      cells.push_back({ratio.is_null() ? "" : fmt::format("{:.2f}x", ratio.get<double>())});
    }
    table.row(std::move(cells), row["pipeline"].get<std::string>(), competes);
  }
  return table.text(style);
}

void report(const Sweep& sweep) {
  if (sweep.kept() > 0) {
    note(fmt::format("{} of {} rows were there already and were kept", sweep.kept(),
                     sweep.planned()));
  }
  if (sweep.lines().empty()) return;
  const Json& setup = sweep.setup();
  const char* const legend =
      sweep.on_gpu()
          ? "times are means per step, all layers, append included; whole step: the model's "
            "weights\n  read once, too; "
          : "times are means per step, all layers; tokens/s and the\n"
            "  ratio count select and attend, not append; ";
  print(fmt::format(
      "{} layers, {} query and {} KV heads of {}; {} steps timed after {}\n\n{}\n"
      "* best of its group, dense aside; {}dense: fp16 K and V, all tokens attended to, "
      "same run\n",
      setup["layers"].get<int>(), setup["query_heads"].get<int>(), setup["kv_heads"].get<int>(),
      setup["head_dim"].get<int>(), setup["steps"].get<int64_t>(), setup["warmup"].get<int64_t>(),
      sweep_table(sweep, TableStyle::of(stdout)), legend));
}

void throughput(const ThroughputFlags& flags, const std::vector<std::string>& command_line) {
  Registry registry = flags.config.open_registry();
  const Config config = flags.config.load(flags.file, registry);
  Devices devices(config.threads);
  Device& device = devices.open(config.pipelines.front(), registry);
  for (const PipelineSpec& spec : config.pipelines) {
    if (&devices.open(spec, registry) != &device) {
      throw Error("{}: the pipelines run on different devices: sweep one device at a time",
                  flags.file.string());
    }
  }
#ifdef SIKV_HAS_MODEL
  if (!flags.model.empty()) {
    const ModelSweepFlags model{flags.model, flags.weights, flags.json, flags.memory};
    return run_model_sweep(model, config, registry, device, command_line);
  }
#endif
  Sweep sweep(flags, config, registry, device, environment(command_line, device));
  sweep.check();
  try {
    sweep.run();
  } catch (const Interrupted&) {
    report(sweep);
    note(fmt::format("stopped after {} of {} rows{}", sweep.finished(), sweep.planned(),
                     flags.json.empty() ? "" : "; the same command goes on from there"));
    throw;
  }
  report(sweep);
}

}  // namespace

Command add_throughput(CLI::App& app, const std::vector<std::string>& command_line) {
  CLI::App* command = app.add_subcommand(
      "throughput", "Long contexts x large batches: memory, time per step, tokens/s against dense");
  auto flags = std::make_shared<ThroughputFlags>();
  add_config_argument(*command, flags->file);
  add_output_option(*command, "--json", flags->json,
                    "keeps every finished row there; a sweep that was interrupted goes on from it");
  command->add_option("--memory", flags->memory, "bounds the cache, as in 8GiB; 0 = what is free")
      ->type_name("SIZE")
      ->transform(CLI::AsSizeValue(false));
#ifdef SIKV_HAS_MODEL
  command
      ->add_option("--model", flags->model,
                   "a whole model around the cache: a model file, or random weights of the "
                   "config's model")
      ->type_name("FILE|random");
  command->add_option("--weights", flags->weights, "of random ones")
      ->type_name("TYPE")
      ->capture_default_str()
      ->check(CLI::IsMember({"fp32", "fp16", "bf16", "int8"}));
#endif
  flags->config.add_to(*command);
  command->footer(examples({
      "sikv throughput configs/throughput.yaml --json sweep.json",
      "sikv throughput configs/throughput.yaml --set source.synthetic.batch=max --memory 4GiB",
      "sikv throughput configs/throughput.yaml --set 'model={preset: llama-3.1-8b}' "
      "--set 'source.synthetic.context=[32768, 131072]'",
#ifdef SIKV_HAS_MODEL
      "sikv throughput configs/throughput_model.yaml --model smollm2.h5",
      "sikv throughput configs/throughput_model.yaml --model random --weights int8 "
      "--set model.layers=4",
#endif
  }));
  return {command, [flags, &command_line] { throughput(*flags, command_line); }};
}

}  // namespace sikv
