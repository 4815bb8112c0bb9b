#include "framework/model/model_throughput.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/progress.h"
#include "framework/base/random.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/throughput.h"
#include "framework/pipeline/pipeline.h"

namespace sikv {
namespace {

// Two chunks of a prefill.
constexpr int64_t kWarmTokens = 4096;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<int32_t> random_tokens(int64_t count, int64_t vocab, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) {
    token = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab)));
  }
  return tokens;
}

}  // namespace

ModelThroughputBench::ModelThroughputBench(Transformer& model, const Registry& registry,
                                           Device& device, const ModelThroughputOptions& options)
    : model_(model), registry_(registry), device_(device), options_(options) {
  SIKV_ASSERT(options.steps > 0 && options.warmup > 0);  // the first is part of TT2T
}

sikv_shape ModelThroughputBench::shape(int64_t context, int batch) const {
  return model_.shape(options_.dtype, context + options_.warmup + options_.steps, batch);
}

// For the cache. On a CPU the prompt that is kept stands beside it, on a GPU the prefill that fills
// it.
uint64_t ModelThroughputBench::room(int64_t context) const {
  const ModelConfig& config = model_.config();
  uint64_t usable = usable_bytes(device_), beside = 0;
  if (device_.is_cuda()) {
    beside = model_.prefill_bytes(context, options_.dtype);
  } else {
    beside = static_cast<uint64_t>(2 * context * config.num_layers * config.num_kv_heads *
                                   config.head_dim * sikv_dtype_bytes(options_.dtype));
    if (prompt_tokens_ == context) usable += beside;
  }
  const uint64_t free = usable > beside ? usable - beside : 0;
  return options_.memory_limit > 0 ? std::min(options_.memory_limit, free) : free;
}

int ModelThroughputBench::largest_batch(const PipelineSpec& spec, int64_t context, int most) {
  return largest_planned_batch(spec, registry_, device_, shape(context, 1),
                               static_cast<int>(options_.warmup + options_.steps), room(context),
                               most);
}

void ModelThroughputBench::check_fits(const PipelineSpec& spec, int64_t context, int batch) {
  const ModelConfig& config = model_.config();
  if (const int64_t last = context + options_.warmup + options_.steps;
      last > config.max_positions) {
    throw Error(
        "a context of {} tokens and {} steps do not fit the context of {}, which is {}: lower "
        "source.synthetic.context",
        context, options_.warmup + options_.steps, config.name, config.max_positions);
  }
  const int largest = largest_batch(spec, context, batch);
  if (largest >= batch) return;
  throw Error("{} at context {} and batch {} does not fit {}: {}", pipeline_text(spec, registry_),
              context, batch, bytes_text(room(context)),
              largest > 0 ? fmt::format("the largest batch that does is {}", largest)
                          : longest_context_text(
                                context, [&](int64_t n) { return largest_batch(spec, n, 1) > 0; }));
}

double ModelThroughputBench::fill(Pipeline& pipeline, int64_t context, int batch) {
  const auto tokens = random_tokens(context, model_.config().vocab_size, options_.seed);
  std::vector<float> logits(static_cast<size_t>(model_.config().vocab_size));
  if (device_.is_cuda()) {
    // Layer by layer: nothing that a cache has is kept twice.
    Progress progress(fmt::format("{} x {}: prefill", batch, context), model_.config().num_layers);
    double filling = 0;
    const auto start = Clock::now();
    const auto hidden = model_.prefill(tokens, options_.dtype, kPromptQueries,
                                       [&](int layer, const PromptRows& rows) {
                                         const auto fill_start = Clock::now();
                                         model_.fill(pipeline, layer, rows);
                                         filling += seconds_since(fill_start);
                                         progress.add();
                                       });
    model_.logits(hidden.data(), 1, logits.data());
    prompt_s_ = seconds_since(start) - filling;
    return filling / batch;
  }
  if (prompt_tokens_ != context) {
    prompt_ = {};
    prompt_tokens_ = 0;
    const auto start = Clock::now();
    prompt_ = model_.prefill(tokens, options_.dtype, kPromptQueries);
    model_.logits(prompt_.hidden.data(), 1, logits.data());
    prompt_s_ = seconds_since(start);
    prompt_tokens_ = context;
  }
  const auto start = Clock::now();
  model_.fill(pipeline, prompt_);
  return seconds_since(start) / batch;
}

template <typename Step>
std::vector<double> ModelThroughputBench::timed_steps(int64_t context, int batch, Step&& step) {
  const int64_t count = options_.warmup + options_.steps;
  const auto tokens =
      random_tokens(batch * count, model_.config().vocab_size, derive_seed(options_.seed, 1));
  std::vector<int32_t> next(static_cast<size_t>(batch));
  std::vector<double> seconds;
  Progress progress(fmt::format("{} x {}: decode steps", batch, context), count);
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<int64_t> positions(static_cast<size_t>(batch), context + i);
    const auto start = Clock::now();
    step(std::span(tokens).subspan(static_cast<size_t>(i * batch), static_cast<size_t>(batch)),
         positions, next.data(), i);
    seconds.push_back(seconds_since(start));
    progress.add();
  }
  return seconds;
}

void ModelThroughputBench::warm_up(const PipelineSpec& spec, int64_t context) {
  const int64_t tokens = std::min(context, kWarmTokens);
  Pipeline pipeline(spec, registry_, device_, shape(tokens, 1),
                    static_cast<int>(options_.warmup + options_.steps), model_.layer_numbers());
  fill(pipeline, tokens, 1);
  timed_steps(tokens, 1, [&](auto token, const auto& positions, int32_t* next, int64_t) {
    model_.step_greedy(pipeline, token, positions, next);
  });
}

Summary ModelThroughputBench::weights_only(int batch) {
  auto seconds =
      timed_steps(0, batch, [&](auto tokens, const auto& positions, int32_t* next, int64_t) {
        model_.step_without_cache(tokens, positions, next);
      });
  seconds.erase(seconds.begin(), seconds.begin() + options_.warmup);
  return summarize(seconds, BadSide::kHigh);
}

ModelThroughput ModelThroughputBench::measure(const PipelineSpec& spec, int64_t context,
                                              int batch) {
  ModelThroughput row;
  row.pipeline = pipeline_text(spec, registry_);
  row.context = context;
  row.batch = batch;
  if (device_.is_cuda()) warm_up(spec, context);
  Pipeline pipeline(spec, registry_, device_, shape(context, batch),
                    static_cast<int>(options_.warmup + options_.steps), model_.layer_numbers());
  const double filled_s = fill(pipeline, context, batch);
  row.first_s = prompt_s_;
  auto seconds = timed_steps(context, batch,
                             [&](auto tokens, const auto& positions, int32_t* next, int64_t i) {
                               if (i == options_.warmup) pipeline.reset_steps();
                               model_.step_greedy(pipeline, tokens, positions, next);
                             });
  row.second_s = row.first_s + filled_s + seconds.front();
  seconds.erase(seconds.begin(), seconds.begin() + options_.warmup);
  row.token_s = summarize(seconds, BadSide::kHigh);
  row.tokens_per_s = batch / row.token_s.mean;
  for (const auto& [stage, samples] : pipeline.times().steps) {
    row.step_s[stage] = summarize(samples, BadSide::kHigh);
  }
  row.budget = pipeline.composition().budget(context + options_.warmup + 1);
  for (const ChosenPart& part : pipeline.composition().parts()) {
    row.variants.push_back({part.role, part.variant->id, part.variant->variant});
  }
  row.bytes_per_token = pipeline.cache().bytes_per_token();
  row.ledger = pipeline.ledger();
  return row;
}

}  // namespace sikv
