#include "framework/model/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/progress.h"
#include "framework/config/pipeline_text.h"
#include "framework/model/dense_pipeline.h"
#include "framework/pipeline/bytes_read.h"

namespace sikv {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// x [n] <- x - log(sum exp(x))
void to_log_probabilities(float* x, int64_t n) {
  const double highest = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(x[i] - highest);
  const double shift = highest + std::log(sum);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(x[i] - shift);
}

// sum p (log p - log q) over [n]
double kl_divergence(const float* log_p, const float* log_q, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += std::exp(static_cast<double>(log_p[i])) * (static_cast<double>(log_p[i]) - log_q[i]);
  }
  return sum;
}

int64_t most_likely(const float* log_p, int64_t n) {
  return std::max_element(log_p, log_p + n) - log_p;
}

}  // namespace

Evaluation::Evaluation(Transformer& model, EvalText text, int32_t dtype, int num_queries,
                       bool all_queries, const Registry& registry, Device& device)
    : model_(model),
      text_(std::move(text)),
      registry_(registry),
      dtype_(dtype),
      num_queries_(num_queries) {
  SIKV_ASSERT(std::ssize(text_.tokens) == text_.prompt + text_.steps + 1 && text_.steps > 0);
  const int64_t context = model.config().max_positions;
  if (text_.prompt + text_.steps > context) {
    throw Error(
        "a prompt of {} tokens and {} steps do not fit the context of {}, which is {}: "
        "lower --prompt or --steps",
        text_.prompt, text_.steps, model.config().name, context);
  }
  const auto start = Clock::now();
  prompt_ = model.prefill(std::span(text_.tokens).first(static_cast<size_t>(text_.prompt)), dtype,
                          all_queries ? static_cast<int>(text_.prompt) : num_queries);
  prefill_s_ = seconds_since(start);
  const int64_t vocab = model.config().vocab_size;
  log_p_.resize(static_cast<size_t>(text_.steps * vocab));
  double nll = 0;
  dense_ = replay(parse_pipeline(kDensePipeline, registry), device,
                  [&](int64_t step, const float* logits) {
                    float* const log_p = log_p_.data() + step * vocab;
                    std::copy_n(logits, vocab, log_p);
                    to_log_probabilities(log_p, vocab);
                    nll -= log_p[text_.tokens[static_cast<size_t>(text_.prompt + step + 1)]];
                  });
  dense_.nll = nll / static_cast<double>(text_.steps);
  dense_.top1_same = 1;
}

std::string Evaluation::dense_pipeline(const Registry& registry) {
  return pipeline_text(parse_pipeline(kDensePipeline, registry), registry);
}

Evaluated Evaluation::run(const PipelineSpec& spec, Device& device) {
  const int64_t vocab = model_.config().vocab_size;
  double nll = 0;
  int64_t same = 0;
  std::vector<double> kl;
  std::vector<float> log_q(static_cast<size_t>(vocab));
  Evaluated row = replay(spec, device, [&](int64_t step, const float* logits) {
    const float* const log_p = log_p_.data() + step * vocab;
    std::copy_n(logits, vocab, log_q.data());
    to_log_probabilities(log_q.data(), vocab);
    nll -= log_q[static_cast<size_t>(text_.tokens[static_cast<size_t>(text_.prompt + step + 1)])];
    kl.push_back(kl_divergence(log_p, log_q.data(), vocab));
    same += most_likely(log_p, vocab) == most_likely(log_q.data(), vocab);
  });
  const double steps = static_cast<double>(text_.steps);
  row.nll = nll / steps;
  row.nll_added = row.nll - dense_.nll;
  row.kl = summarize(kl, BadSide::kHigh);
  row.top1_same = static_cast<double>(same) / steps;
  return row;
}

template <typename Judge>
Evaluated Evaluation::replay(const PipelineSpec& spec, Device& device, Judge&& judge) {
  Evaluated row;
  row.pipeline = pipeline_text(spec, registry_);
  const ModelConfig& config = model_.config();
  Progress progress(row.pipeline, config.num_layers + text_.steps);
  Pipeline pipeline(spec, registry_, device, model_.shape(dtype_, text_.prompt + text_.steps),
                    static_cast<int>(text_.steps), model_.layer_numbers());
  pipeline.count_attended();
  for (int l = 0; l < config.num_layers; ++l) {
    model_.fill(pipeline, l, prompt_.layers[static_cast<size_t>(l)], num_queries_);
    progress.add();
  }
  std::vector<float> logits(static_cast<size_t>(config.vocab_size));
  std::vector<double> token_s;
  for (int64_t step = 0; step < text_.steps; ++step) {
    const int64_t position = text_.prompt + step;
    const auto start = Clock::now();
    model_.step(pipeline, {&text_.tokens[static_cast<size_t>(position)], 1}, {&position, 1},
                logits.data());
    token_s.push_back(seconds_since(start));
    judge(step, logits.data());
    progress.add();
  }
  row.token_s = summarize(token_s, BadSide::kHigh);
  row.budget = pipeline.composition().budget(text_.prompt + 1);
  for (const ChosenPart& part : pipeline.composition().parts()) {
    row.variants.push_back({part.role, part.variant->id, part.variant->variant});
  }
  row.bytes_per_token = pipeline.cache().bytes_per_token();
  row.ledger = pipeline.ledger();
  row.compression_total = dense_row_bytes(config.head_dim) * config.num_kv_heads *
                          config.num_layers * static_cast<double>(text_.prompt + text_.steps) /
                          static_cast<double>(row.ledger.total());
  const StageTimes& times = pipeline.times();
  row.prefill_s = times.fit + times.encode + times.observe;
  for (const auto& [stage, samples] : times.steps) {
    row.step_s[stage] = summarize(samples, BadSide::kHigh);
  }
  row.counters = counters_by_name(pipeline);
  row.scans_per_step = scans_per_step(row.counters);
  row.scan_bytes = scan_bytes(row.counters);
  row.attended_bytes = attended_bytes(pipeline, pipeline.attended());
  return row;
}

}  // namespace sikv
