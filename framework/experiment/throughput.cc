#include "framework/experiment/throughput.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>

#include "framework/base/error.h"
#include "framework/base/interrupt.h"
#include "framework/base/progress.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/read_gpu.h"
#include "framework/experiment/source.h"
#include "framework/pipeline/bytes_read.h"
#include "framework/pipeline/staging.h"
#include "framework/trace/synth.h"

namespace sikv {
namespace {

constexpr int64_t kDefaultSteps = 16;
// Tokens drawn before they repeat with other signs: filling runs at the speed of memory.
constexpr int64_t kTile = 4096;
// A GPU also holds the queries of the prompts and all decode steps' tokens, and rounds each of the
// 15 or so blocks of a layer up to 2 MiB.
constexpr double kDrawnQueries = kSynthPromptQueries;
constexpr double kRoundingOfLayer = 16 << 20;
// Of the free memory. A GPU's is nobody else's, and what a cache takes there is known to the byte.
constexpr double kUsable = 0.9, kUsableOfGpu = 0.97;

// Memory that this process has taken, on a GPU that anyone has.
uint64_t taken_bytes(const Device& device) {
  if (device.is_cuda()) return device.info().memory_bytes - device.free_bytes();
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

// Bytes that a pipeline of `shape` plans for.
uint64_t planned_bytes(const PipelineSpec& spec, const Registry& registry, Device& device,
                       const sikv_shape& shape, int max_new_tokens) {
  const auto planned = [&](const sikv_shape& shape) {
    const Composition composition(spec, registry, device, shape);
    Ledger ledger =
        composition.planned(shape.max_tokens, composition.cache_options(max_new_tokens));
    ledger.add("selector_state", composition.selector().state_bytes());
    return ledger;
  };
  if (device.is_cuda()) {
    // Plugins allocate their state when they are made: none is made for what could never fit.
    sikv_shape one = shape;
    one.max_sequences = 1;
    const Ledger ledger = planned(one);
    const uint64_t cache =
        (ledger.total() - ledger.bytes("workspace") - ledger.bytes("selection")) *
        static_cast<uint64_t>(shape.max_sequences);
    if (cache > device.info().memory_bytes) return cache;
  }
  return planned(shape).total();
}

}  // namespace

// One synthetic sequence that stands for all sequences of a batch.
class ThroughputBench::SharedInput {
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
  size_t row_bytes() const { return drawn_.k.size(); }
  const void* queries() const { return queries_.data(); }
  size_t query_bytes() const { return queries_.size(); }
  int64_t num_queries() const { return drawn_.num_queries - steps_; }

  // [B, heads, D] of one decode step; valid until the next call.
  struct Step {
    const void *k, *v, *q;
  };
  int64_t token_bytes(int heads) const {
    return int64_t{heads} * shape_.head_dim * sikv_dtype_bytes(shape_.dtype);
  }
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

uint64_t usable_bytes(const Device& device) {
  const double share = device.is_cuda() ? kUsableOfGpu : kUsable;
  return static_cast<uint64_t>(share * static_cast<double>(device.free_bytes()));
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
    return planned_bytes(spec, registry, device, shape, max_new_tokens) <= bytes;
  }));
}

std::string longest_context_text(int64_t context, const std::function<bool(int64_t)>& fits) {
  const int64_t pages = largest_fitting(context / SIKV_PAGE_TOKENS,
                                        [&](int64_t n) { return fits(n * SIKV_PAGE_TOKENS); });
  return longest_context_text(pages * SIKV_PAGE_TOKENS);
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
  if (device.is_cuda()) {
    weights_ = DeviceBuffer(device, static_cast<size_t>(config.model->weight_bytes));
  }
}

sikv_shape ThroughputBench::shape(int64_t context, int batch) const {
  return model_shape(*config_.model, parse_dtype(config_.source.synthetic->dtype),
                     context + warmup() + steps_, batch);
}

double ThroughputBench::state_bytes(const PipelineSpec& spec, const sikv_shape& shape) {
  auto& measured = state_bytes_[pipeline_text(spec, registry_)];
  auto found = measured.lower_bound(shape.max_tokens);
  if (found == measured.end()) {
    sikv_shape one = shape;
    one.num_layers = one.max_sequences = 1;
    const double bytes = static_cast<double>(run(spec, one, 0, 1).ledger.bytes("selector_state"));
    found = measured.emplace(shape.max_tokens, bytes).first;
  }
  return found->second * shape.num_layers * shape.max_sequences;
}

uint64_t ThroughputBench::plan_bytes(const PipelineSpec& spec, int64_t context, int batch) {
  return planned_bytes(spec, registry_, device_, shape(context, batch),
                       static_cast<int>(warmup() + steps_));
}

uint64_t ThroughputBench::cache_bytes(const PipelineSpec& spec, int64_t context, int batch) {
  return plan_bytes(spec, context, batch) +
         static_cast<uint64_t>(state_bytes(spec, shape(context, batch)));
}

bool ThroughputBench::has_room(uint64_t cache, int64_t context, int batch) const {
  if (memory_limit_ > 0 && cache > memory_limit_) return false;
  const sikv_shape s = shape(context, batch);
  // K and V of one layer and sequence, drawn in fp32 and then rounded; a GPU gets the rounded ones.
  const auto input =
      static_cast<double>(s.max_tokens) * s.num_kv_heads * s.head_dim * 2 *
      ((device_.is_cuda() ? 0 : sizeof(float)) + static_cast<double>(sikv_dtype_bytes(s.dtype)));
  double beside = 0;
  if (device_.is_cuda()) {
    const auto query = double{sizeof(uint16_t)} * s.num_query_heads * s.head_dim;
    const auto tokens = static_cast<double>(kDrawnQueries + 2 * (warmup() + steps_));
    beside = kRoundingOfLayer * s.num_layers + tokens * 2 * query * batch;
  }
  return static_cast<double>(cache) + input + beside <= static_cast<double>(usable_bytes(device_));
}

bool ThroughputBench::fits(const PipelineSpec& spec, int64_t context, int batch) {
  // The state is measured; what is too large without it is not asked for it.
  return has_room(plan_bytes(spec, context, batch), context, batch) &&
         has_room(cache_bytes(spec, context, batch), context, batch);
}

int ThroughputBench::largest_batch(const PipelineSpec& spec, int64_t context, int most) {
  return static_cast<int>(largest_fitting(
      most, [&](int64_t batch) { return fits(spec, context, static_cast<int>(batch)); }));
}

void ThroughputBench::check_fits(const PipelineSpec& spec, int64_t context, int batch) {
  if (fits(spec, context, batch)) return;
  const std::string name = pipeline_text(spec, registry_);
  const uint64_t plan = plan_bytes(spec, context, batch);
  const std::string needs =
      bytes_text(has_room(plan, context, batch) ? cache_bytes(spec, context, batch) : plan);
  const uint64_t usable = usable_bytes(device_);
  const std::string room = bytes_text(memory_limit_ > 0 ? std::min(memory_limit_, usable) : usable);
  if (const int largest = largest_batch(spec, context, batch - 1); largest > 0) {
    throw Error(
        "{} at context {} and batch {} needs {} and may take {}: the largest batch that fits is {}",
        name, context, batch, needs, room, largest);
  }
  throw Error("{} at context {} and batch {} needs {} of {}: {}", name, context, batch, needs, room,
              longest_context_text(context, [&](int64_t n) { return fits(spec, n, 1); }));
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
  const uint64_t before = taken_bytes(device_);
  Pipeline pipeline(spec, registry_, device_, shape, static_cast<int>(new_tokens));
  {
    Progress progress(label + ": filling layers", shape.num_layers);
    Staging staging(device_);  // on a GPU: copied there once
    sikv_rows keys{}, values{};
    const void* queries = nullptr;
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      if (layer > 0 && !device_.is_cuda()) input.draw(layer);
      if (layer == 0 || !device_.is_cuda()) {
        keys = input.keys(), values = input.values();
        keys.data = staging.bring(0, keys.data, input.row_bytes());
        values.data = staging.bring(1, values.data, input.row_bytes());
        queries = staging.bring(2, input.queries(), input.query_bytes());
      }
      pipeline.prefill(layer, keys, values, queries, static_cast<int>(input.num_queries()));
      progress.add();
    }
  }
  if (device_.is_cuda()) {
    replay_steps(pipeline, input, shape, warmup, steps, row);
  } else {
    run_steps(pipeline, input, shape, warmup, steps);
  }
  const uint64_t after = taken_bytes(device_);
  row.memory_growth = after > before ? after - before : 0;

  row.budget = pipeline.composition().budget(row.context + warmup + 1);
  for (const ChosenPart& part : pipeline.composition().parts()) {
    row.variants.push_back({part.role, part.variant->id, part.variant->variant});
  }
  row.ledger = pipeline.ledger();
  row.bytes_per_token = pipeline.cache().bytes_per_token();
  const double dense_row = dense_row_bytes(shape.head_dim);
  const double stored = pipeline.cache().bytes_per_stored_token();
  if (stored > 0) row.compression = dense_row / stored;
  row.compression_total = dense_row * shape.num_layers * shape.max_sequences * shape.num_kv_heads *
                          shape.max_tokens / static_cast<double>(row.ledger.total());
  const StageTimes& times = pipeline.times();
  row.prefill_s = {{"fit", times.fit}, {"encode", times.encode}, {"observe", times.observe}};
  for (const auto& [stage, samples] : times.steps) {
    row.step_s[stage] = summarize(samples, BadSide::kHigh);
  }
  return row;
}

void ThroughputBench::run_steps(Pipeline& pipeline, SharedInput& input, const sikv_shape& shape,
                                int64_t warmup, int64_t steps) {
  Progress progress(
      fmt::format("{} x {}: decode steps", shape.max_sequences, shape.max_tokens - warmup - steps),
      warmup + steps);
  const size_t heads =
      static_cast<size_t>(shape.max_sequences) * static_cast<size_t>(shape.num_query_heads);
  std::vector<float> out(heads * static_cast<size_t>(shape.head_dim)), lse(heads);
  for (int64_t step = 0; step < warmup + steps; ++step) {
    if (step == warmup) pipeline.reset_steps();
    pipeline.begin_step();
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      const SharedInput::Step token = input.step(layer, step);
      pipeline.append(layer, token.k, token.v);
      pipeline.attend(layer, token.q, out.data(), lse.data());
    }
    progress.add();
  }
}

// All steps are enqueued before the first is over, as by a server that keeps its GPU busy. Layers
// share the step's k, v and q, which change from step to step outside of what is timed.
void ThroughputBench::replay_steps(Pipeline& pipeline, SharedInput& input, const sikv_shape& shape,
                                   int64_t warmup, int64_t steps, Throughput& row) {
  const size_t heads =
      static_cast<size_t>(shape.max_sequences) * static_cast<size_t>(shape.num_query_heads);
  const size_t kv_bytes = static_cast<size_t>(shape.max_sequences) *
                          static_cast<size_t>(input.token_bytes(shape.num_kv_heads));
  const size_t q_bytes = static_cast<size_t>(shape.max_sequences) *
                         static_cast<size_t>(input.token_bytes(shape.num_query_heads));
  // Tokens of all steps, and those of the step at work.
  const size_t n = static_cast<size_t>(warmup + steps);
  const DeviceBuffer all_k(device_, n * kv_bytes), all_v(device_, n * kv_bytes);
  const DeviceBuffer all_q(device_, n * q_bytes);
  for (size_t step = 0; step < n; ++step) {
    const SharedInput::Step token = input.step(0, static_cast<int64_t>(step));
    device_.copy_in(all_k.as<char>() + step * kv_bytes, token.k, kv_bytes);
    device_.copy_in(all_v.as<char>() + step * kv_bytes, token.v, kv_bytes);
    device_.copy_in(all_q.as<char>() + step * q_bytes, token.q, q_bytes);
  }
  const DeviceBuffer k(device_, kv_bytes), v(device_, kv_bytes), q(device_, q_bytes);
  const DeviceBuffer out(device_, heads * static_cast<size_t>(shape.head_dim) * sizeof(float));
  const DeviceBuffer lse(device_, heads * sizeof(float));
  const std::vector<Pipeline::LayerStep> layers(
      static_cast<size_t>(shape.num_layers),
      {k.as<>(), v.as<>(), q.as<>(), out.as<float>(), lse.as<float>()});
  const auto mark = [&](int64_t step, int i) {
    if (step >= warmup) device_.mark(static_cast<int>(3 * (step - warmup)) + i);
  };
  for (int64_t step = 0; step < warmup + steps; ++step) {
    check_interrupt();
    const size_t at = static_cast<size_t>(step);
    device_.copy_in(k.as<>(), all_k.as<char>() + at * kv_bytes, kv_bytes);
    device_.copy_in(v.as<>(), all_v.as<char>() + at * kv_bytes, kv_bytes);
    device_.copy_in(q.as<>(), all_q.as<char>() + at * q_bytes, q_bytes);
    mark(step, 0);
    pipeline.step(layers);
    mark(step, 1);
    if (weights_.bytes() > 0) read_on_gpu(weights_, device_);
    mark(step, 2);
    if (step < warmup) pipeline.synchronize();
  }
  pipeline.synchronize();
  std::vector<double> attention, whole;
  for (int i = 0; i < 3 * static_cast<int>(steps); i += 3) {
    attention.push_back(device_.seconds(i, i + 1));
    whole.push_back(device_.seconds(i, i + 2));
  }
  pipeline.reset_steps();
  row.step_s["step"] = summarize(attention, BadSide::kHigh);
  if (weights_.bytes() > 0) row.whole_step_s = summarize(whole, BadSide::kHigh);
}

}  // namespace sikv
