#include "framework/experiment/throughput.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>

#include "framework/base/error.h"
#include "framework/base/progress.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/source.h"
#include "framework/pipeline/pipeline.h"
#include "framework/trace/synth.h"

namespace sikv {
namespace {

constexpr int64_t kDefaultSteps = 16;
// Tokens drawn before they repeat with other signs: filling runs at the speed of memory.
constexpr int64_t kTile = 4096;
// A selector's state grows with the tokens, up to a limit for some; these counts tell by how much.
constexpr int64_t kProbeTokens[] = {4096, 8192};
constexpr double kUsable = 0.9;  // of the free memory

uint64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  uint64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

// The largest n in [0, most] that fits, if all below it do too.
template <typename Fits>
int64_t largest_fitting(int64_t most, Fits&& fits) {
  int64_t low = 0, high = 1;
  while (high <= most && fits(high)) {
    low = high;
    high *= 2;
  }
  high = std::min(high, most + 1);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

Ledger planned(const PipelineSpec& spec, const Registry& registry, Device& device,
               const sikv_shape& shape, int max_new_tokens) {
  const Composition composition(spec, registry, device, shape);
  return composition.planned(shape.max_tokens, composition.cache_options(max_new_tokens));
}

// One synthetic sequence that stands for all sequences of a batch.
class SharedInput {
 public:
  SharedInput(const Config& config, const sikv_shape& shape, int64_t steps)
      : shape_(shape),
        context_(shape.max_tokens - steps),
        steps_(steps),
        synthesizer_([&] {
          SynthSpec spec;
          spec.kind = parse_synth_kind(config.source.synthetic->kind);
          spec.context = context_;
          spec.steps = steps;
          spec.num_layers = shape.num_layers;
          spec.num_query_heads = shape.num_query_heads;
          spec.num_kv_heads = shape.num_kv_heads;
          spec.head_dim = shape.head_dim;
          spec.dtype = shape.dtype;
          spec.seed = config.source.synthetic->seed;
          spec.tile_tokens = kTile;
          return Synthesizer(spec);
        }()),
        first_(static_cast<size_t>(shape.max_sequences), 0),
        count_(first_.size(), static_cast<int32_t>(context_)) {}

  // Draws the next layer and keeps its decode steps.
  void draw(int layer) {
    synthesizer_.fill(0, layer, drawn_);
    const auto tail = [&](const std::vector<std::byte>& rows, int heads) {
      return std::vector<std::byte>(rows.end() - steps_ * token_bytes(heads), rows.end());
    };
    decode_.push_back({tail(drawn_.k, shape_.num_kv_heads), tail(drawn_.v, shape_.num_kv_heads),
                       tail(drawn_.q, shape_.num_query_heads)});
    const auto from = drawn_.q.begin();
    queries_.clear();
    for (int b = 0; b < shape_.max_sequences; ++b) {
      queries_.insert(queries_.end(), from,
                      from + num_queries() * token_bytes(shape_.num_query_heads));
    }
  }

  // The prompts of the layer drawn last.
  sikv_rows keys() const { return rows(drawn_.k); }
  sikv_rows values() const { return rows(drawn_.v); }
  const void* queries() const { return queries_.data(); }
  int64_t num_queries() const { return drawn_.num_queries - steps_; }

  // [B, heads, D] of one decode step; valid until the next call.
  struct Step {
    const void *k, *v, *q;
  };
  Step step(int layer, int64_t step) {
    const Decode& from = decode_[static_cast<size_t>(layer)];
    return {repeated(k_, from.k, step, shape_.num_kv_heads),
            repeated(v_, from.v, step, shape_.num_kv_heads),
            repeated(q_, from.q, step, shape_.num_query_heads)};
  }

 private:
  struct Decode {
    std::vector<std::byte> k, v, q;  // [steps, heads, D]
  };

  int64_t token_bytes(int heads) const {
    return int64_t{heads} * shape_.head_dim * sikv_dtype_bytes(shape_.dtype);
  }

  sikv_rows rows(const std::vector<std::byte>& data) const {
    return {data.data(),    shape_.dtype,  static_cast<int32_t>(context_),
            first_.data(),  count_.data(), int64_t{shape_.num_kv_heads} * shape_.head_dim,
            shape_.head_dim};
  }

  const void* repeated(std::vector<std::byte>& to, const std::vector<std::byte>& from, int64_t step,
                       int heads) const {
    const auto bytes = static_cast<size_t>(token_bytes(heads));
    to.resize(bytes * first_.size());
    for (size_t b = 0; b < first_.size(); ++b) {
      std::memcpy(to.data() + b * bytes, from.data() + static_cast<size_t>(step) * bytes, bytes);
    }
    return to.data();
  }

  sikv_shape shape_;
  int64_t context_, steps_;
  Synthesizer synthesizer_;
  std::vector<int32_t> first_, count_;  // [B]: every sequence reads the same rows
  TraceLayer drawn_;
  std::vector<std::byte> queries_;  // [B, W, Hq, D]
  std::vector<Decode> decode_;      // by layer
  std::vector<std::byte> k_, v_, q_;
};

}  // namespace

uint64_t usable_bytes(const Device& device) {
  return static_cast<uint64_t>(kUsable * static_cast<double>(device.free_bytes()));
}

sikv_shape model_shape(const ModelSpec& model, int32_t dtype, int64_t tokens, int batch) {
  if (tokens > std::numeric_limits<int32_t>::max()) {
    throw Error("a sequence of {} tokens is too long: positions are 32-bit, lower the context",
                tokens);
  }
  sikv_shape shape{};
  shape.struct_size = sizeof shape;
  shape.num_layers = model.layers;
  shape.num_query_heads = model.query_heads;
  shape.num_kv_heads = model.kv_heads;
  shape.head_dim = model.head_dim;
  shape.dtype = dtype;
  shape.max_sequences = batch;
  shape.max_tokens = static_cast<int32_t>(tokens);
  shape.rope_theta = model.rope_theta;
  return shape;
}

int largest_planned_batch(const PipelineSpec& spec, const Registry& registry, Device& device,
                          sikv_shape shape, int max_new_tokens, uint64_t bytes, int most) {
  return static_cast<int>(largest_fitting(most, [&](int64_t batch) {
    shape.max_sequences = static_cast<int32_t>(batch);
    return planned(spec, registry, device, shape, max_new_tokens).total() <= bytes;
  }));
}

ThroughputBench::ThroughputBench(const Config& config, const Registry& registry, Device& device,
                                 uint64_t memory_limit)
    : config_(config), registry_(registry), device_(device), memory_limit_(memory_limit) {
  if (!config.source.synthetic || !config.model) {
    throw Error(
        "{}: throughput takes a model and a synthetic source, whose context and batch it sweeps: "
        "set model and source.synthetic",
        config.file.string());
  }
  steps_ = config.measure.steps > 0  ? config.measure.steps
           : config.source.steps > 0 ? config.source.steps
                                     : kDefaultSteps;
}

sikv_shape ThroughputBench::shape(int64_t context, int batch) const {
  return model_shape(*config_.model, parse_dtype(config_.source.synthetic->dtype),
                     context + warmup() + steps_, batch);
}

double ThroughputBench::state_bytes(const PipelineSpec& spec, const sikv_shape& shape) {
  const std::string name = pipeline_text(spec, registry_);
  auto found = state_bytes_.find(name);
  if (found == state_bytes_.end()) {
    const auto probe = [&](int64_t tokens) {
      sikv_shape small = this->shape(tokens, 1);
      small.num_layers = 1;
      small.max_tokens = static_cast<int32_t>(tokens + 1);
      return static_cast<double>(run(spec, small, 0, 1).ledger.bytes("selector_state"));
    };
    found = state_bytes_.emplace(name, std::array{probe(kProbeTokens[0]), probe(kProbeTokens[1])})
                .first;
  }
  const auto [low, high] = found->second;
  const double slope = (high - low) / static_cast<double>(kProbeTokens[1] - kProbeTokens[0]);
  const double one = low + slope * static_cast<double>(shape.max_tokens - kProbeTokens[0]);
  return std::max(0.0, one) * shape.num_layers * shape.max_sequences;
}

uint64_t ThroughputBench::cache_bytes(const PipelineSpec& spec, int64_t context, int batch) {
  const sikv_shape s = shape(context, batch);
  const Ledger plan = planned(spec, registry_, device_, s, static_cast<int>(warmup() + steps_));
  return plan.total() + static_cast<uint64_t>(state_bytes(spec, s));
}

bool ThroughputBench::fits(const PipelineSpec& spec, int64_t context, int batch) {
  const uint64_t cache = cache_bytes(spec, context, batch);
  if (memory_limit_ > 0 && cache > memory_limit_) return false;
  const sikv_shape s = shape(context, 1);
  // K and V of one layer and sequence, drawn in fp32 and then rounded.
  const auto input = static_cast<double>(s.max_tokens) * s.num_kv_heads * s.head_dim * 2 *
                     (sizeof(float) + static_cast<double>(sikv_dtype_bytes(s.dtype)));
  return static_cast<double>(cache) + input <= static_cast<double>(usable_bytes(device_));
}

int ThroughputBench::largest_batch(const PipelineSpec& spec, int64_t context, int most) {
  return static_cast<int>(largest_fitting(
      most, [&](int64_t batch) { return fits(spec, context, static_cast<int>(batch)); }));
}

void ThroughputBench::check_fits(const PipelineSpec& spec, int64_t context, int batch) {
  if (fits(spec, context, batch)) return;
  const std::string name = pipeline_text(spec, registry_);
  const std::string needs = bytes_text(cache_bytes(spec, context, batch));
  const uint64_t usable = usable_bytes(device_);
  const std::string room = bytes_text(memory_limit_ > 0 ? std::min(memory_limit_, usable) : usable);
  if (const int largest = largest_batch(spec, context, batch - 1); largest > 0) {
    throw Error(
        "{} at context {} and batch {} needs {} and may take {}: the largest batch that fits is {}",
        name, context, batch, needs, room, largest);
  }
  const int64_t pages = largest_fitting(
      context / SIKV_PAGE_TOKENS, [&](int64_t n) { return fits(spec, n * SIKV_PAGE_TOKENS, 1); });
  throw Error(
      "{} at context {} and batch {} needs {} of {}: not one sequence of that length fits; the "
      "longest context that does is {}",
      name, context, batch, needs, room, pages * SIKV_PAGE_TOKENS);
}

Throughput ThroughputBench::measure(const PipelineSpec& spec, int64_t context, int batch) {
  return run(spec, shape(context, batch), warmup(), steps_);
}

Throughput ThroughputBench::run(const PipelineSpec& spec, const sikv_shape& shape, int64_t warmup,
                                int64_t steps) {
  const int64_t new_tokens = warmup + steps;
  Throughput row;
  row.pipeline = pipeline_text(spec, registry_);
  row.context = shape.max_tokens - new_tokens;
  row.batch = shape.max_sequences;
  const std::string label = fmt::format("{} x {}", row.batch, row.context);

  SharedInput input(config_, shape, new_tokens);
  input.draw(0);  // its memory is in place before the cache's growth is measured
  const uint64_t before = resident_bytes();
  Pipeline pipeline(spec, registry_, device_, shape, static_cast<int>(new_tokens));
  {
    Progress progress(label + ": filling layers", shape.num_layers);
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      if (layer > 0) input.draw(layer);
      pipeline.prefill(layer, input.keys(), input.values(), input.queries(),
                       static_cast<int>(input.num_queries()));
      progress.add();
    }
  }
  Progress progress(label + ": decode steps", new_tokens);
  const size_t heads =
      static_cast<size_t>(shape.max_sequences) * static_cast<size_t>(shape.num_query_heads);
  std::vector<float> out(heads * static_cast<size_t>(shape.head_dim)), lse(heads);
  for (int64_t step = 0; step < new_tokens; ++step) {
    if (step == warmup) pipeline.reset_step_times();
    pipeline.begin_step();
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      const SharedInput::Step token = input.step(layer, step);
      pipeline.append(layer, token.k, token.v);
      pipeline.attend(layer, token.q, out.data(), lse.data());
    }
    progress.add();
  }
  const uint64_t after = resident_bytes();
  row.memory_growth = after > before ? after - before : 0;

  row.budget = pipeline.composition().budget(row.context + warmup + 1);
  for (const ChosenPart& part : pipeline.composition().parts()) {
    row.variants.push_back({part.role, part.variant->id, part.variant->variant});
  }
  row.ledger = pipeline.ledger();
  row.bytes_per_token = pipeline.cache().bytes_per_token();
  const double dense_row = 4.0 * shape.head_dim;
  if (row.bytes_per_token > 0) row.compression = dense_row / row.bytes_per_token;
  row.compression_total = dense_row * shape.num_layers * shape.max_sequences * shape.num_kv_heads *
                          shape.max_tokens / static_cast<double>(row.ledger.total());
  const StageTimes& times = pipeline.times();
  row.prefill_s = {{"fit", times.fit}, {"encode", times.encode}, {"observe", times.observe}};
  for (const auto& [stage, samples] : times.steps) {
    row.step_s[stage] = summarize(samples, BadSide::kHigh);
  }
  return row;
}

}  // namespace sikv
