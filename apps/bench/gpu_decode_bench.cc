// Check, then time: one decode step of attention of one layer on a GPU, from q ready to out
// written.
//
//   gpu_decode_bench --pipeline 'rot_lm+rot_lm > self_index(tables=6bit,rerank=4) > sparse_flash'
//   ...
//                    --shape 8x131072:2048 ...  [--steps N] [--json FILE] ...
//
// Shapes are BATCHxCONTEXT:BUDGET; the budget replaces the selector's. Each pipeline is filled
// through prefill with tokens made on the GPU (gpu_synth.h), in so many layers that more than
// --cold-mb of its own traffic lie between two uses of a layer. Selector and kernel of all layers
// are recorded in one graph; a replay is one step of a model's attention, its time divided by the
// layers is a sample. Queries change from step to step; with --due-share those of a pipeline with
// refresh_cosine turn away by chance (gpu_synth.h), so that any cosine from 0.5 to 0.6 makes this
// share of its rows due for a scan at a step. First every pipeline is compared with its `ref`
// variants on a short context.
#include <cuda_runtime.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <ostream>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "apps/bench/gpu_bench.h"
#include "framework/base/error.h"
#include "framework/base/file.h"
#include "framework/config/pipeline_text.h"
#include "framework/device/cuda_device.h"
#include "framework/pipeline/bytes_read.h"
#include "framework/pipeline/pipeline.h"
#include "framework/report/environment.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;
using namespace bench;  // NOLINT: all of it is for this

constexpr int kTail = 128;          // newest tokens, beside the context
constexpr int kNewTokens = 256;     // room in the cache, never used
constexpr int kPromptQueries = 48;  // for selector.observe
constexpr int kQueryBank = 64;      // steps whose queries differ
constexpr int kMostLayers = 64;
// Outputs near the cut of a selection differ where sums in another order prefer another token.
constexpr double kCheckError = 0.01;

struct Flags {
  std::vector<std::string> pipelines, shapes;
  int64_t steps = 100, warmup = 12, cold_mb = 200;
  int kv_heads = 8, group = 4, head_dim = 128, layers = 0;
  double due_share = 0;  // 0: as the queries of all pipelines move
  bool check = true, stages = true;
  std::filesystem::path json;
};

struct Shape {
  int batch, context;
  std::string budget;
};

Shape parse_shape(const std::string& text) {
  Shape shape{};
  char budget[32] = "";
  if (std::sscanf(text.c_str(), "%dx%d:%31s", &shape.batch, &shape.context, budget) < 2 ||
      shape.batch < 1 || shape.context < SIKV_PAGE_TOKENS) {
    throw Error("the shape '{}' is not BATCHxCONTEXT:BUDGET, such as 8x131072:2048", text);
  }
  shape.budget = budget;
  return shape;
}

// ---- a pipeline with tokens in it ---------------------------------------------------------------

sikv_shape cache_shape(const Flags& flags, int layers, int batch, int tokens) {
  sikv_shape shape{};
  shape.struct_size = sizeof shape;
  shape.num_layers = layers;
  shape.num_query_heads = flags.kv_heads * flags.group;
  shape.num_kv_heads = flags.kv_heads;
  shape.head_dim = flags.head_dim;
  shape.dtype = SIKV_FP16;
  shape.max_sequences = batch;
  shape.max_tokens = tokens + kNewTokens;
  return shape;
}

double number_option(const PluginSpec& plugin, const char* name, double otherwise) {
  for (const auto& [key, value] : plugin.options) {
    if (key == name) return std::atof(value.c_str());
  }
  return otherwise;
}

bool queries_turn(const Flags& flags, const PipelineSpec& spec) {
  return flags.due_share > 0 && number_option(spec.selector, "refresh_cosine", 0) != 0;
}

// Selector and kernel of a filled pipeline, as they run in a step.
class Stages {
 public:
  Stages(const Flags& flags, Pipeline& pipeline, Device& device, const sikv_shape& shape)
      : pipeline_(pipeline),
        device_(device),
        shape_(shape),
        rows_(static_cast<size_t>(shape.max_sequences * shape.num_kv_heads)),
        capacity_(pipeline.composition().capacity()),
        slots_(device, rows_ * static_cast<size_t>(capacity_) * sizeof(int32_t)),
        counts_(device, rows_ * sizeof(int32_t)),
        workspace_(device, std::max(pipeline.composition().selector_workspace(),
                                    pipeline.composition().kernel_workspace())),
        q_(device, layer_q_bytes() * static_cast<size_t>(shape.num_layers)),
        bank_(device, q_.bytes() * kQueryBank),
        out_(device, 2 * q_.bytes()),
        lse_(device, out_.bytes() / static_cast<size_t>(shape.head_dim)) {
    SynthShape synth{shape.max_sequences, 0, flags.kv_heads, flags.group, flags.head_dim, 0};
    for (int step = 0; step < kQueryBank; ++step) {
      for (int layer = 0; layer < shape.num_layers; ++layer) {
        synth.seed = static_cast<uint64_t>(layer) + 1;
        uint8_t* const q = bank_.as<uint8_t>() + step * q_.bytes() + layer * layer_q_bytes();
        if (queries_turn(flags, pipeline.composition().spec())) {
          fill_turning_queries(q, synth, flags.due_share, kQueryBank, step, stream());
        } else {
          fill_queries(q, synth, 1, step, stream());
        }
      }
    }
    check_cuda(cudaGetLastError(), "making queries");
  }

  cudaStream_t stream() const { return static_cast<cudaStream_t>(device_.stream()); }

  // The queries of a step, before the clock starts.
  void bring_queries(int64_t step) {
    check_cuda(cudaMemcpyAsync(q_.as<>(), bank_.as<uint8_t>() + step % kQueryBank * q_.bytes(),
                               q_.bytes(), cudaMemcpyDeviceToDevice, stream()),
               "copying queries");
  }
  void begin_step(int64_t step) { pipeline_.composition().selector().begin_step(step); }
  void select(int layer) {
    const sikv_cache_view view = pipeline_.cache().view(layer);
    pipeline_.composition().selector().run({sizeof(sikv_select_args), shape_.num_query_heads, &view,
                                            q(layer), scale(), 0, selection(), nullptr},
                                           workspace_.as<>(), stream());
  }
  void attend(int layer) {
    const sikv_cache_view view = pipeline_.cache().view(layer);
    float* const out = out_.as<float>() + size_t(layer) * layer_q_bytes() / 2;
    float* const lse = lse_.as<float>() + size_t(layer) * layer_q_bytes() / 2 / shape_.head_dim;
    pipeline_.composition().kernel().run({sizeof(sikv_attend_args), shape_.num_query_heads, &view,
                                          q(layer), scale(), 0, selection(), out, lse, nullptr},
                                         workspace_.as<>(), stream());
  }

  // [L, B, Hq, D]
  std::vector<float> output() {
    std::vector<float> out(out_.bytes() / sizeof(float));
    device_.copy_out(out.data(), out_.as<>(), out_.bytes());
    return out;
  }
  std::vector<uint8_t> query(int layer) {
    std::vector<uint8_t> bytes(layer_q_bytes());
    device_.copy_out(bytes.data(), q(layer), bytes.size());
    return bytes;
  }

 private:
  size_t layer_q_bytes() const {
    return size_t{2} * shape_.max_sequences * shape_.num_query_heads * shape_.head_dim;
  }
  const void* q(int layer) const { return q_.as<uint8_t>() + size_t(layer) * layer_q_bytes(); }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)); }
  sikv_selection selection() const {
    return {slots_.as<int32_t>(), counts_.as<int32_t>(), capacity_, 0};
  }

  Pipeline& pipeline_;
  Device& device_;
  sikv_shape shape_;
  size_t rows_;
  int32_t capacity_;
  DeviceBuffer slots_, counts_, workspace_, q_, bank_, out_, lse_;
};

// ---- the check ----------------------------------------------------------------------------------

// Largest relative difference of a sequence's output from the ref variants', over a few steps.
double error_against_ref(const Flags& flags, const PipelineSpec& spec, const Registry& registry,
                         Device& device) {
  constexpr int kBatch = 2, kTokens = 4096 + kTail, kSteps = 6;
  const sikv_shape shape = cache_shape(flags, 1, kBatch, kTokens);
  PipelineSpec ref = spec;
  ref.device = "cpu";
  for (const char* role : {"keys", "values", "selector", "attention"}) ref.force[role] = "ref";
  const std::unique_ptr<Device> cpu = open_cpu_device(0);
  Pipeline ours(spec, registry, device, shape, kNewTokens);
  Pipeline truth(ref, registry, *cpu, shape, kNewTokens);

  Prompt prompt(device, {kBatch, kTokens, flags.kv_heads, flags.group, flags.head_dim, 0},
                kPromptQueries);
  prompt.make(0);
  ours.prefill(0, prompt.keys(), prompt.values(), prompt.queries(), kPromptQueries);
  std::vector<uint8_t> k(prompt.bytes()), v(prompt.bytes()), q(prompt.query_bytes());
  device.copy_out(k.data(), prompt.keys().data, k.size());
  device.copy_out(v.data(), prompt.values().data, v.size());
  device.copy_out(q.data(), prompt.queries(), q.size());
  sikv_rows keys = prompt.keys(), values = prompt.values();
  keys.data = k.data();
  values.data = v.data();
  truth.prefill(0, keys, values, q.data(), kPromptQueries);

  Stages stages(flags, ours, device, shape);
  std::vector<float> want(size_t{kBatch} * shape.num_query_heads * shape.head_dim),
      lse(want.size() / shape.head_dim);
  double largest = 0;
  for (int step = 0; step < kSteps; ++step) {
    stages.bring_queries(step);
    stages.begin_step(step);
    stages.select(0);
    stages.attend(0);
    device.synchronize();
    truth.begin_step();
    truth.attend(0, stages.query(0).data(), want.data(), lse.data());
    const std::vector<float> got = stages.output();
    const size_t sequence = want.size() / kBatch;
    for (size_t b = 0; b < kBatch; ++b) {
      double difference = 0, norm = 0;
      for (size_t i = b * sequence; i < (b + 1) * sequence; ++i) {
        difference += (double{got[i]} - want[i]) * (double{got[i]} - want[i]);
        norm += double{want[i]} * want[i];
      }
      const double error = std::sqrt(difference / norm);
      if (!(error <= largest)) largest = error;  // NaN stays
    }
  }
  return largest;
}

// ---- bytes a step must move ---------------------------------------------------------------------

double plane_bytes(const sikv_plane& plane) {
  return static_cast<double>(plane.bytes_per_tile) / plane.tile_tokens;
}

// Of a token's key, scanned.
double index_bytes(const sikv_layout& key) {
  double bytes = 0;
  for (uint32_t i = 0; i < key.num_planes; ++i) {
    if (key.planes[i].role == SIKV_INDEX_CODE) bytes += plane_bytes(key.planes[i]);
  }
  return bytes;
}

// Of a token, gathered. A key's line has all there is of it and the values' bytes IN_LINE too.
double gathered_bytes(const sikv_layout& layout, bool is_key) {
  if (is_key && layout.line_bytes > 0) return layout.line_bytes;
  double bytes = 0;
  for (uint32_t i = 0; i < layout.num_planes; ++i) {
    if (layout.planes[i].organisation != SIKV_IN_LINE) bytes += plane_bytes(layout.planes[i]);
  }
  return bytes;
}

// Of one layer: index codes of every token in `scans` of the rows, keys of what is ranked, values of
// what is kept, exact tail and pinned tokens.
double bytes_of_step(const Flags& flags, const Composition& composition, const Shape& shape,
                     double scans) {
  const PipelineSpec& spec = composition.spec();
  const double rows = double(shape.batch) * flags.kv_heads;
  const double key = gathered_bytes(composition.key_layout(), true);
  const double value = gathered_bytes(composition.value_layout(), false);
  const double exact = rows * 2 * 2 * flags.head_dim * (kTail + spec.pinned);
  const auto budget = composition.budget(shape.context + kTail);
  if (!budget) return rows * shape.context * (key + value) + exact;
  const double kept = std::min<double>(static_cast<double>(*budget), shape.context);
  const double rerank = number_option(spec.selector, "rerank", 1);
  const double ranked = std::min<double>(rerank * kept, shape.context);
  const double scan = index_bytes(composition.key_layout()) * shape.context * scans;
  return rows * (scan + ranked * key + kept * value) + exact;
}

// ---- a row --------------------------------------------------------------------------------------

class Row {
 public:
  Row(const Flags& flags, PipelineSpec spec, const Shape& shape, const Registry& registry,
      Device& device)
      : flags_(flags), spec_(std::move(spec)), shape_(shape), registry_(registry), device_(device) {
    const auto options = registry.options(SIKV_SELECTOR, spec_.selector.id);
    const bool has_budget = std::any_of(
        options.begin(), options.end(),
        [](const sikv_option_spec& option) { return std::string_view(option.name) == "budget"; });
    if (!has_budget || shape.budget.empty()) return;
    std::erase_if(spec_.selector.options,
                  [](const auto& option) { return option.first == "budget"; });
    spec_.selector.options.emplace_back("budget", shape.budget);
  }

  Json measure() {
    const int tokens = shape_.context + kTail;
    const sikv_shape one = cache_shape(flags_, 1, shape_.batch, tokens);
    // At least: rows that turn away are scanned more often.
    const double least = bytes_of_step(flags_, Composition(spec_, registry_, device_, one), shape_,
                                       1.0 / number_option(spec_.selector, "scan_every", 1));
    const double cold = static_cast<double>(flags_.cold_mb) * 1e6;
    layers_ = flags_.layers > 0
                  ? flags_.layers
                  : std::clamp(static_cast<int>(std::ceil(cold / least)), 2, kMostLayers);
    sikv_shape shape = one;
    shape.num_layers = layers_;
    Pipeline pipeline(spec_, registry_, device_, shape, kNewTokens);
    {
      Prompt prompt(device_,
                    {shape_.batch, tokens, flags_.kv_heads, flags_.group, flags_.head_dim, 0},
                    kPromptQueries);
      for (int layer = 0; layer < layers_; ++layer) {
        prompt.make(layer);
        pipeline.prefill(layer, prompt.keys(), prompt.values(), prompt.queries(), kPromptQueries);
      }
    }
    Stages stages(flags_, pipeline, device_, shape);
    const auto us = times(pipeline, stages, true, true);
    const std::optional<double> scans = scans_per_step(counters_);
    const double bytes = bytes_of_step(flags_, pipeline.composition(), shape_, scans.value_or(1));
    if (std::any_of(output_.begin(), output_.end(), [](float x) { return !std::isfinite(x); })) {
      throw Error("{} answers numbers that are not finite", pipeline_text(spec_, registry_));
    }
    const auto budget = pipeline.composition().budget(tokens);
    Json row = {{"batch", shape_.batch},        {"context", shape_.context},
                {"kv_heads", flags_.kv_heads},  {"group", flags_.group},
                {"head_dim", flags_.head_dim},  {"budget", budget ? Json(*budget) : Json(nullptr)},
                {"budget_text", shape_.budget}, {"pipeline", pipeline_text(spec_, registry_)}};
    for (const ChosenPart& part : pipeline.composition().parts()) {
      row["variant"][part.role] = part.variant->variant;
    }
    row["layers"] = layers_;
    row["median_us"] = median(us);
    row["mean_us"] = mean(us);
    row["p95_us"] = quantile(us, 0.95);
    row["max_us"] = *std::max_element(us.begin(), us.end());
    if (scans) row["scans_per_step"] = *scans;
    if (!counters_.empty()) row["counters"] = counters_;
    if (queries_turn(flags_, spec_)) row["due_share"] = flags_.due_share;
    row["bytes"] = bytes;
    row["tb_per_s"] = bytes / mean(us) / 1e6;
    if (flags_.stages) {
      row["stages_us"]["select"] = mean(times(pipeline, stages, true, false));
      row["stages_us"]["attend"] = mean(times(pipeline, stages, false, true));
    }
    row["pages_mb"] = pipeline.cache().bytes_per_token() * layers_ * shape_.batch *
                      flags_.kv_heads * shape_.context / 1e6;
    return row;
  }

 private:
  // Microseconds per layer of each step; counters_ of these and of the steps that warm up.
  std::vector<double> times(const Pipeline& pipeline, Stages& stages, bool select, bool attend) {
    stages.bring_queries(next_step_);
    stages.begin_step(next_step_);
    // Once without a recording, so that nothing is loaded or configured inside it.
    enqueue(stages, select, attend);
    ++next_step_;
    device_.synchronize();
    const std::unique_ptr<Device::Recording> step =
        device_.record([&] { enqueue(stages, select, attend); });
    const Counters before = counters_by_name(pipeline);
    std::vector<double> us =
        time_ms(device_, static_cast<int>(flags_.warmup), static_cast<int>(flags_.steps),
                [&](int, cudaEvent_t begin, cudaEvent_t end, cudaStream_t stream) {
                  stages.bring_queries(next_step_);
                  stages.begin_step(next_step_++);
                  check_cuda(cudaEventRecord(begin, stream), "cudaEventRecord");
                  step->replay();
                  check_cuda(cudaEventRecord(end, stream), "cudaEventRecord");
                });
    for (double& time : us) time *= 1e3 / layers_;
    counters_ = counters_by_name(pipeline);
    for (auto& [name, count] : counters_) count -= before.at(name);
    if (attend) output_ = stages.output();
    return us;
  }
  void enqueue(Stages& stages, bool select, bool attend) {
    for (int layer = 0; layer < layers_; ++layer) {
      if (select) stages.select(layer);
      if (attend) stages.attend(layer);
    }
  }

  const Flags& flags_;
  PipelineSpec spec_;
  Shape shape_;
  const Registry& registry_;
  Device& device_;
  int layers_ = 0;
  int64_t next_step_ = 0;
  std::vector<float> output_;
  Counters counters_;
};

void run(const Flags& flags, const std::vector<std::string>& command_line) {
  const Registry registry = Registry::standard({}, served_devices);
  const std::unique_ptr<Device> device = open_cuda_device();
  std::vector<PipelineSpec> specs;
  for (const std::string& text : flags.pipelines) specs.push_back(parse_pipeline(text, registry));
  Json result = {{"environment", environment(command_line, *device)}};
  result["copy_tb_per_s"] = copy_tb_per_s(*device);
  std::printf("%s, copy %.2f TB/s\n", device->info().name, result["copy_tb_per_s"].get<double>());
  result["rows"] = Json::array();
  int failed = 0;
  for (const PipelineSpec& spec : specs) {
    const std::string text = pipeline_text(spec, registry);
    try {
      double error = 0;
      if (flags.check) {
        error = error_against_ref(flags, spec, registry, *device);
        std::printf("%s: %.2g off ref\n", text.c_str(), error);
        if (!(error <= kCheckError)) throw Error("{} is off its ref variants by {}", text, error);
      }
      std::set<std::pair<int, int>> without_budget;
      for (const std::string& shape : flags.shapes) {
        const Shape parsed = parse_shape(shape);
        const std::pair<int, int> size(parsed.batch, parsed.context);
        if (without_budget.count(size) != 0) continue;
        Json row = Row(flags, spec, parsed, registry, *device).measure();
        row["check"] = error;
        std::printf(
            "%-16s %8.2f us (mean %.2f, p95 %.2f, max %.2f; select %.2f, attend %.2f), "
            "%.2f TB/s",
            shape.c_str(), row["median_us"].get<double>(), row["mean_us"].get<double>(),
            row["p95_us"].get<double>(), row["max_us"].get<double>(),
            flags.stages ? row["stages_us"]["select"].get<double>() : 0,
            flags.stages ? row["stages_us"]["attend"].get<double>() : 0,
            row["tb_per_s"].get<double>());
        if (row.contains("scans_per_step")) {
          std::printf(", %.2f scans per step", row["scans_per_step"].get<double>());
        }
        std::printf("  %s\n", row["pipeline"].get<std::string>().c_str());
        std::fflush(stdout);
        if (row["budget"].is_null()) without_budget.insert(size);
        result["rows"].push_back(std::move(row));
      }
    } catch (const Error& failure) {
      std::printf("FAILED: %s\n", failure.what());
      std::fflush(stdout);
      ++failed;
    }
  }
  if (!flags.json.empty()) {
    write_atomically(flags.json, [&](std::ostream& file) { file << result.dump(1) << '\n'; });
  }
  if (failed > 0) throw Error("{} of {} pipelines failed", failed, specs.size());
}

}  // namespace
}  // namespace sikv

int main(int argc, char** argv) {
  sikv::Flags flags;
  CLI::App app("One decode step of attention of pipelines on a GPU.");
  app.add_option("--pipeline", flags.pipelines, "printed form")->required();
  app.add_option("--shape", flags.shapes, "BATCHxCONTEXT:BUDGET")->required();
  app.add_option("--steps", flags.steps)->check(CLI::PositiveNumber);
  app.add_option("--warmup", flags.warmup)->check(CLI::NonNegativeNumber);
  app.add_option("--cold-mb", flags.cold_mb, "traffic between two uses of a layer");
  app.add_option("--layers", flags.layers, "instead of as many as --cold-mb asks for");
  app.add_option("--kv-heads", flags.kv_heads)->check(CLI::PositiveNumber);
  app.add_option("--group", flags.group, "query heads per KV head")->check(CLI::PositiveNumber);
  app.add_option("--head-dim", flags.head_dim);
  app.add_option("--due-share", flags.due_share,
                 "probability that a row's query turns away at a step, with refresh_cosine; 0: "
                 "queries move as without it")
      ->check(CLI::Range(0.0, 1.0));
  app.add_flag("!--no-check", flags.check, "skip the comparison with ref");
  app.add_flag("!--no-stages", flags.stages, "skip timing selector and kernel apart");
  app.add_option("--json", flags.json, "also write the result here");
  CLI11_PARSE(app, argc, argv);
  try {
    sikv::run(flags, {argv, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_decode_bench: %s\n", error.what());
    return 2;
  }
  return 0;
}
