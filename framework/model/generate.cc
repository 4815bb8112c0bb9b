#include "framework/model/generate.h"

#include <algorithm>
#include <chrono>

#include "framework/base/error.h"
#include "framework/base/interrupt.h"
#include "framework/config/pipeline_text.h"
#include "framework/metrics/summary.h"
#include "framework/pipeline/bytes_read.h"

namespace sikv {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int32_t most_likely(const std::vector<float>& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace

Generator::Generator(Transformer& model, std::vector<int32_t> prompt,
                     const GenerateOptions& options)
    : model_(model), options_(options), prompt_tokens_(std::ssize(prompt)) {
  const int64_t context = model.config().max_positions;
  if (prompt_tokens_ + options.max_tokens > context) {
    throw Error(
        "a prompt of {} tokens and {} more do not fit the context of {}, which is {}: give "
        "a shorter prompt or fewer --max-tokens",
        prompt_tokens_, options.max_tokens, model.config().name, context);
  }
  const auto start = Clock::now();
  prompt_ = model.prefill(prompt, options.dtype,
                          options.all_queries ? static_cast<int>(prompt_tokens_) : kPromptQueries);
  std::vector<float> logits(static_cast<size_t>(model.config().vocab_size));
  model.logits(prompt_.hidden.data(), 1, logits.data());
  first_token_ = most_likely(logits);
  first_s_ = seconds_since(start);
}

Generated Generator::run(const PipelineSpec& spec, const Registry& registry, Device& device,
                         const std::function<void(int32_t)>& on_token) {
  Generated result;
  result.pipeline = pipeline_text(spec, registry);
  result.first_s = first_s_;
  const auto start = Clock::now();
  Pipeline pipeline(spec, registry, device,
                    model_.shape(options_.dtype, prompt_tokens_ + options_.max_tokens),
                    options_.max_tokens, model_.layer_numbers());
  model_.fill(pipeline, prompt_);
  std::vector<double> steps;
  int32_t token = first_token_;
  int64_t position = prompt_tokens_;
  while (token != options_.stop_token) {
    result.tokens.push_back(token);
    on_token(token);
    if (std::ssize(result.tokens) == options_.max_tokens) break;
    check_interrupt();
    const auto step_start = Clock::now();
    int32_t next = 0;
    model_.step_greedy(pipeline, {&token, 1}, {&position, 1}, &next);
    token = next;
    ++position;
    if (position == prompt_tokens_ + 1) {
      result.second_s = first_s_ + seconds_since(start);
    } else {
      steps.push_back(seconds_since(step_start));
    }
  }
  if (!steps.empty()) result.token_s = summarize(steps, BadSide::kHigh).median;
  result.ledger = pipeline.ledger();
  result.scans_per_step = scans_per_step(counters_by_name(pipeline));
  result.bytes_per_token = pipeline.cache().bytes_per_token();
  const ModelConfig& config = model_.config();
  result.dense_bytes = static_cast<uint64_t>(position) * static_cast<uint64_t>(config.num_layers) *
                       static_cast<uint64_t>(config.num_kv_heads) *
                       static_cast<uint64_t>(4 * config.head_dim);
  return result;
}

}  // namespace sikv
