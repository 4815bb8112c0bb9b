#include "apps/throughput/model_sweep.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>

#include "apps/common/command.h"
#include "apps/common/show.h"
#include "apps/throughput/sweep_file.h"
#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/source.h"
#include "framework/model/dense_pipeline.h"
#include "framework/model/model_throughput.h"
#include "framework/model/random_model.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;

// More sequences than this are not tried for `batch: max`.
constexpr int kLargestBatch = 1 << 12;
constexpr int64_t kDefaultSteps = 16;

WeightType weight_type(const std::string& name) {
  if (name == "fp32") return WeightType::kFp32;
  if (name == "fp16") return WeightType::kFp16;
  if (name == "bf16") return WeightType::kBf16;
  return WeightType::kInt8;
}

ModelFile open_model(const ModelSweepFlags& flags, const Config& config, const Device& device) {
  if (flags.model != "random") return read_model(flags.model);
  if (!config.model) {
    throw Error("{}: random weights need a shape: set model, to a preset such as smollm2-135m",
                config.file.string());
  }
  return random_model(*config.model, weight_type(flags.weights), 1, device);
}

ModelThroughputOptions options_of(const ModelSweepFlags& flags, const Config& config) {
  if (!config.source.synthetic) {
    throw Error(
        "{}: throughput sweeps context and batch of a synthetic source: set "
        "source.synthetic",
        config.file.string());
  }
  ModelThroughputOptions options;
  options.steps = config.measure.steps > 0  ? config.measure.steps
                  : config.source.steps > 0 ? config.source.steps
                                            : kDefaultSteps;
  options.warmup = std::max<int64_t>(1, config.measure.warmup);
  options.dtype = parse_dtype(config.source.synthetic->dtype);
  options.memory_limit = flags.memory;
  options.seed = config.source.synthetic->seed;
  return options;
}

class ModelSweep {
 public:
  ModelSweep(const ModelSweepFlags& flags, const Config& config, const Registry& registry,
             Device& device, const std::vector<std::string>& command_line)
      : flags_(flags),
        config_(config),
        registry_(registry),
        options_(options_of(flags, config)),
        file_(flags.json, environment(command_line, device)),
        model_(open_model(flags, config, device), device),
        bench_(model_, registry, device, options_),
        specs_({parse_pipeline(kDensePipeline, registry)}) {
    const std::string dense = pipeline_text(specs_.front(), registry);
    for (const PipelineSpec& spec : expand_budgets(config, registry)) {
      if (pipeline_text(spec, registry) != dense) specs_.push_back(spec);
    }
    setup_ = {{"model", model_.config().name},
              {"weight_bytes", model_.step_bytes()},
              {"dtype", config.source.synthetic->dtype},
              {"seed", options_.seed},
              {"steps", options_.steps},
              {"warmup", options_.warmup},
              {"threads", device.info().num_threads},
              {"memory_limit", flags.memory},
              {"tokens_per_s", "batch / mean step of the whole model"}};
  }

  void run() {
    check();
    try {
      for (const int64_t context : config_.source.synthetic->context) run(context);
    } catch (const Interrupted&) {
      report();
      note(fmt::format("stopped after {} rows{}", rows_.size(),
                       flags_.json.empty() ? "" : "; the same command goes on from there"));
      throw;
    }
    report();
  }

 private:
  // What cannot fit is refused before anything is measured.
  void check() {
    const SyntheticSpec& source = *config_.source.synthetic;
    for (const int64_t context : source.context) {
      for (const int batch : source.batch_max ? std::vector<int>{1} : source.batch) {
        for (const PipelineSpec& spec : specs_) bench_.check_fits(spec, context, batch);
      }
    }
  }

  void run(int64_t context) {
    const SyntheticSpec& source = *config_.source.synthetic;
    if (source.batch_max) return run(context, std::nullopt);
    for (const int batch : source.batch) run(context, batch);
  }

  // No batch: each pipeline at its largest.
  void run(int64_t context, std::optional<int> batch) {
    const Json asked = batch ? Json(*batch) : Json("max");
    double dense = 0;
    for (const PipelineSpec& spec : specs_) {
      const Json key = {{"pipeline", pipeline_text(spec, registry_)},
                        {"context", context},
                        {"batch_asked", asked},
                        {"setup", setup_}};
      const Json* known = file_.find_here(key);
      kept_ += known != nullptr;
      if (known == nullptr) {
        const int count =
            batch ? *batch : std::max(1, bench_.largest_batch(spec, context, kLargestBatch));
        known = &file_.add(measure(key, spec, context, count, dense));
      }
      rows_.push_back(*known);
      if (&spec == specs_.data()) dense = (*known)["tokens_per_s"].get<double>();
    }
  }

  Json measure(const Json& key, const PipelineSpec& spec, int64_t context, int batch,
               double dense) {
    const ModelThroughput measured = bench_.measure(spec, context, batch);
    const Summary weights = bench_.weights_only(batch);
    Json row = key;
    row["batch"] = batch;
    row["budget"] = nullptr;
    if (measured.budget) row["budget"] = *measured.budget;
    row["tokens_per_s"] = measured.tokens_per_s;
    row["ratio_to_dense"] = dense == 0 ? 1.0 : measured.tokens_per_s / dense;
    row["weights_only_tokens_per_s"] = batch / weights.mean;
    row["first_token_s"] = measured.first_s;
    row["second_token_s"] = measured.second_s;
    row["metrics"] = {{"bytes_per_token", measured.bytes_per_token}};
    row["memory"] = memory_json(measured.ledger);
    std::map<std::string, Summary> latency = measured.step_s;
    latency["token"] = measured.token_s;
    latency["weights_only"] = weights;
    row["latency_us"] = latency_json({}, latency);
    row["variants"] = variants_json(measured.variants);
    return row;
  }

  std::string table() const {
    using enum Table::Align;
    using enum Table::Better;
    Table table({{"batch", kRight, kHigher},
                 {"KV\nmemory"},
                 {"first\ntoken"},
                 {"second\ntoken", kRight, kLower},
                 {"cache\nms/step", kRight, kLower},
                 {"model\nms/step", kRight, kLower},
                 {"weights\nalone ms"},
                 {"tokens/s", kRight, kHigher},
                 {"to\ndense", kRight, kHigher}},
                "pipeline");
    std::string group;
    for (const Json& row : rows_) {
      const std::string title =
          fmt::format("context {}, batch {}", row["context"].get<int64_t>(),
                      row["batch_asked"].is_string() ? "max" : row["batch_asked"].dump());
      const bool first = title != group;
      if (first) table.group(group = title);
      const Json& latency = row["latency_us"];
      const auto mean_us = [&](const char* what) { return latency[what]["mean"].get<double>(); };
      // Of a step that is one graph, what it takes beyond the weights.
      const double cache_us = latency.contains("append")
                                  ? mean_us("append") + mean_us("select") + mean_us("attend")
                                  : mean_us("token") - mean_us("weights_only");
      const double ratio = row["ratio_to_dense"].get<double>();
      const auto seconds = [&](const char* what) {
        const double s = row[what].get<double>();
        return Table::Cell{duration_text(s), s};
      };
      table.row({number_cell(row["batch"].get<double>()),
                 bytes_cell(row["memory"]["total"].get<uint64_t>()),
                 seconds("first_token_s"),
                 seconds("second_token_s"),
                 number_cell(cache_us * 1e-3),
                 number_cell(mean_us("token") * 1e-3),
                 number_cell(mean_us("weights_only") * 1e-3),
                 number_cell(row["tokens_per_s"].get<double>()),
                 {fmt::format("{:.2f}x", ratio), ratio}},
                row["pipeline"].get<std::string>(), !first);
    }
    return table.text(TableStyle::of(stdout));
  }

  void report() const {
    if (kept_ > 0) note(fmt::format("{} rows were there already and were kept", kept_));
    if (rows_.empty()) return;
    print(fmt::format(
        "{}, {} of weights; {} steps timed after {}\n\n{}\n"
        "* best of its group, dense aside; times are means; first and second token: of one "
        "sequence, filling\n  its cache is in the second; weights alone: a step without attention, "
        "the limit of tokens/s\n",
        model_.config().name, bytes_text(model_.step_bytes()), options_.steps, options_.warmup,
        table()));
  }

  const ModelSweepFlags& flags_;
  const Config& config_;
  const Registry& registry_;
  ModelThroughputOptions options_;
  SweepFile file_;
  Transformer model_;
  ModelThroughputBench bench_;
  std::vector<PipelineSpec> specs_;  // dense first
  Json setup_;
  std::vector<Json> rows_;
  size_t kept_ = 0;
};

}  // namespace

void run_model_sweep(const ModelSweepFlags& flags, const Config& config, const Registry& registry,
                     Device& device, const std::vector<std::string>& command_line) {
  ModelSweep(flags, config, registry, device, command_line).run();
}

}  // namespace sikv
