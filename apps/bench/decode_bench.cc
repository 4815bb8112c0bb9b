// One decode step of attention, select and attend, of several pipelines that take turns.
//
//   decode_bench --pipeline 'sign_vq+intq > self_index(budget=2048,pinned=64) > sparse_flash' ...
//                [--context T] [--layers L] [--kv-heads H] [--group G] [--head-dim D] [--dtype
//                fp16]
//                [--steps N] [--warmup N] [--threads N] [--json FILE]
//
// All pipelines, and dense attention before them, hold the same L layers of one synthetic sequence
// and answer the same queries. Step by step each one takes its turn at every layer, so a layer's
// tokens have left the CPU's caches when they are read again, and every pipeline sees the same
// neighbours on the machine. Times are per layer. First each pipeline is compared with its `ref`
// variants on a short context.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <ostream>
#include <string>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/file.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/source.h"
#include "framework/experiment/throughput.h"
#include "framework/pipeline/pipeline.h"
#include "framework/report/environment.h"
#include "framework/trace/synth.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kDense = "fp16+fp16 > full(pinned=0) > dense_attention";
// The check's context, and how far outputs may lie apart there, relative to their length: near the
// cut of a selection, sums in another order may prefer another token.
constexpr int64_t kCheckTokens = 8192;
constexpr double kCheckError = 0.01;

struct Flags {
  std::vector<std::string> pipelines;
  int64_t context = 131072, steps = 32, warmup = 4;
  int layers = 2, kv_heads = 8, group = 4, head_dim = 128, threads = 0;
  std::string dtype = "fp16";
  std::filesystem::path json;
};

struct Contender {
  std::string text;
  Pipeline pipeline;
  double error = 0;  // largest relative difference from the first contender's output
};

class DecodeBench {
 public:
  DecodeBench(const Flags& flags, const std::vector<PipelineSpec>& specs, const Registry& registry,
              Device& device)
      : flags_(flags) {
    ModelSpec model;
    model.layers = flags.layers;
    model.query_heads = flags.kv_heads * flags.group;
    model.kv_heads = flags.kv_heads;
    model.head_dim = flags.head_dim;
    const int64_t new_tokens = flags.warmup + flags.steps;
    shape_ = model_shape(model, parse_dtype(flags.dtype), flags.context + new_tokens, 1);
    for (const PipelineSpec& spec : specs) {
      contenders_.push_back(std::unique_ptr<Contender>(
          new Contender{pipeline_text(spec, registry),
                        {spec, registry, device, shape_, static_cast<int>(new_tokens)}}));
    }
    fill();
  }

  void run() {
    const size_t heads = static_cast<size_t>(shape_.num_query_heads);
    std::vector<float> out(heads * static_cast<size_t>(shape_.head_dim)), lse(heads);
    std::vector<std::vector<float>> first(layers_.size(), out);
    for (int64_t step = 0; step < flags_.warmup + flags_.steps; ++step) {
      for (const auto& contender : contenders_) {
        Pipeline& pipeline = contender->pipeline;
        if (step == flags_.warmup) pipeline.reset_steps();
        pipeline.begin_step();
        for (size_t l = 0; l < layers_.size(); ++l) {
          const int layer = static_cast<int>(l);
          pipeline.append(layer, at(layers_[l].k, step, shape_.num_kv_heads),
                          at(layers_[l].v, step, shape_.num_kv_heads));
          pipeline.attend(layer, at(layers_[l].q, step, shape_.num_query_heads), out.data(),
                          lse.data());
          if (contender == contenders_.front()) first[l] = out;
          contender->error = std::max(contender->error, relative_error(out, first[l]));
        }
      }
    }
  }

  // Of the last contender.
  double error() const { return contenders_.back()->error; }

  // One row per pipeline; microseconds per layer.
  Json rows() const {
    Json rows = Json::array();
    for (const auto& contender : contenders_) {
      const StageTimes& times = contender->pipeline.times();
      const std::vector<double> select = per_layer(times.steps.at("select"));
      const std::vector<double> attend = per_layer(times.steps.at("attend"));
      std::vector<double> both(select);
      for (size_t i = 0; i < both.size(); ++i) both[i] += attend[i];
      const auto budget = contender->pipeline.composition().budget(flags_.context);
      Json row = {{"pipeline", contender->text}, {"context", flags_.context}};
      row["budget"] = budget ? Json(*budget) : Json(nullptr);
      row["median_us"] = median(both);
      row["mean_us"] = mean(both);
      row["least_us"] = *std::min_element(both.begin(), both.end());
      row["select_us"] = {{"median", median(select)}, {"mean", mean(select)}};
      row["attend_us"] = {{"median", median(attend)}, {"mean", mean(attend)}};
      for (const ChosenPart& part : contender->pipeline.composition().parts()) {
        row["variants"][part.role] = part.variant->variant;
      }
      rows.push_back(std::move(row));
    }
    return rows;
  }

 private:
  // K, V, Q of the decode steps of one layer.
  struct Steps {
    std::vector<std::byte> k, v, q;
  };

  void fill() {
    SynthSpec spec;
    spec.context = flags_.context;
    spec.steps = flags_.warmup + flags_.steps;
    spec.num_layers = flags_.layers;
    spec.num_query_heads = shape_.num_query_heads;
    spec.num_kv_heads = shape_.num_kv_heads;
    spec.head_dim = shape_.head_dim;
    spec.dtype = shape_.dtype;
    spec.tile_tokens = 4096;
    Synthesizer synthesizer(spec);
    const int32_t first = 0, count = static_cast<int32_t>(flags_.context);
    for (int layer = 0; layer < flags_.layers; ++layer) {
      TraceLayer drawn;
      synthesizer.fill(0, layer, drawn);
      const auto rows = [&](const std::vector<std::byte>& data) {
        return sikv_rows{data.data(),    shape_.dtype,
                         count,          &first,
                         &count,         int64_t{shape_.num_kv_heads} * shape_.head_dim,
                         shape_.head_dim};
      };
      for (const auto& contender : contenders_) {
        contender->pipeline.prefill(layer, rows(drawn.k), rows(drawn.v), drawn.q.data(),
                                    static_cast<int>(drawn.num_queries - spec.steps));
      }
      const auto last = [&](const std::vector<std::byte>& data, int heads) {
        return std::vector<std::byte>(
            data.end() - static_cast<ptrdiff_t>(spec.steps * token_bytes(heads)), data.end());
      };
      layers_.push_back({last(drawn.k, shape_.num_kv_heads), last(drawn.v, shape_.num_kv_heads),
                         last(drawn.q, shape_.num_query_heads)});
    }
  }

  int64_t token_bytes(int heads) const {
    return int64_t{heads} * shape_.head_dim * sikv_dtype_bytes(shape_.dtype);
  }
  const std::byte* at(const std::vector<std::byte>& data, int64_t step, int heads) const {
    return data.data() + step * token_bytes(heads);
  }

  static double relative_error(const std::vector<float>& out, const std::vector<float>& exact) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      difference += (double{out[i]} - exact[i]) * (double{out[i]} - exact[i]);
      norm += double{exact[i]} * exact[i];
    }
    return std::sqrt(difference / norm);
  }
  std::vector<double> per_layer(std::vector<double> seconds) const {
    for (double& s : seconds) s *= 1e6 / flags_.layers;
    return seconds;
  }
  static double mean(const std::vector<double>& x) {
    return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
  }
  static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return (x[(x.size() - 1) / 2] + x[x.size() / 2]) / 2;
  }

  const Flags& flags_;
  sikv_shape shape_;
  std::vector<std::unique_ptr<Contender>> contenders_;
  std::vector<Steps> layers_;
};

void check(const Flags& flags, const PipelineSpec& spec, const Registry& registry, Device& device) {
  Flags few = flags;
  few.context = std::min(flags.context, kCheckTokens);
  few.layers = 1;
  few.steps = 4;
  few.warmup = 0;
  PipelineSpec ref = spec;
  for (const char* role : {"keys", "values", "selector", "attention"}) ref.force[role] = "ref";
  DecodeBench bench(few, {ref, spec}, registry, device);
  bench.run();
  if (bench.error() <= kCheckError) return;
  throw Error("{} is off its ref variants by {:.3f}", pipeline_text(spec, registry), bench.error());
}

void run(const Flags& flags, const std::vector<std::string>& command_line) {
  const Registry registry = Registry::standard();
  const std::unique_ptr<Device> device = open_cpu_device(flags.threads);
  std::vector<PipelineSpec> specs = {parse_pipeline(kDense, registry)};
  for (const std::string& text : flags.pipelines) specs.push_back(parse_pipeline(text, registry));
  for (const PipelineSpec& spec : specs) check(flags, spec, registry, *device);

  DecodeBench bench(flags, specs, registry, *device);
  bench.run();
  const Json rows = bench.rows();
  for (const Json& row : rows) {
    std::printf("%8.1f us (mean %.1f, least %.1f; select %.1f, attend %.1f)  %s\n",
                row["median_us"].get<double>(), row["mean_us"].get<double>(),
                row["least_us"].get<double>(), row["select_us"]["median"].get<double>(),
                row["attend_us"]["median"].get<double>(),
                row["pipeline"].get<std::string>().c_str());
  }
  if (flags.json.empty()) return;
  const Json result = {{"environment", environment(command_line, *device)}, {"rows", rows}};
  write_atomically(flags.json, [&](std::ostream& file) { file << result.dump(1) << '\n'; });
}

}  // namespace
}  // namespace sikv

int main(int argc, char** argv) {
  sikv::Flags flags;
  CLI::App app("One decode step of attention of several pipelines that take turns.");
  app.add_option("--pipeline", flags.pipelines, "printed form")->required();
  app.add_option("--context", flags.context)->check(CLI::PositiveNumber);
  app.add_option("--layers", flags.layers)->check(CLI::PositiveNumber);
  app.add_option("--kv-heads", flags.kv_heads)->check(CLI::PositiveNumber);
  app.add_option("--group", flags.group, "query heads per KV head")->check(CLI::PositiveNumber);
  app.add_option("--head-dim", flags.head_dim);
  app.add_option("--dtype", flags.dtype)->check(CLI::IsMember({"fp16", "bf16", "fp32"}));
  app.add_option("--steps", flags.steps)->check(CLI::PositiveNumber);
  app.add_option("--warmup", flags.warmup)->check(CLI::NonNegativeNumber);
  app.add_option("--threads", flags.threads, "0: one per core");
  app.add_option("--json", flags.json, "also write the result here");
  CLI11_PARSE(app, argc, argv);
  try {
    sikv::run(flags, {argv, argv + argc});
  } catch (const sikv::Error& error) {
    std::fprintf(stderr, "decode_bench: %s\n", error.what());
    return 2;
  }
  return 0;
}
