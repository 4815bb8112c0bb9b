#include "framework/model/transformer.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/interrupt.h"
#include "framework/base/progress.h"

namespace sikv {

Transformer::Transformer(ModelFile model, Device& device)
    : model_(std::make_unique<ModelFile>(std::move(model))),
      device_(device),
      backend_(device.is_cuda() ? make_cuda_backend(*model_, device)
                                : make_cpu_backend(*model_, device)) {}

sikv_shape Transformer::shape(int32_t dtype, int64_t max_tokens, int batch) const {
  return {sizeof(sikv_shape),
          config().num_layers,
          config().num_query_heads,
          config().num_kv_heads,
          config().head_dim,
          dtype,
          batch,
          static_cast<int32_t>(max_tokens),
          config().rope_theta};
}

std::vector<int> Transformer::layer_numbers() const {
  std::vector<int> numbers(static_cast<size_t>(config().num_layers));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

void Transformer::check_token(int32_t token) const {
  if (token < 0 || token >= config().vocab_size) {
    throw Error(
        "token {} is not in the vocabulary of {}, which has {} tokens: was the text "
        "tokenised for another model?",
        token, config().name, config().vocab_size);
  }
}

Offer Transformer::offer(int64_t tokens, int num_queries) const {
  return {"a model's own prompt", config().num_layers,
          config().num_layers,    std::max<int64_t>(0, tokens - num_queries),
          !device_.is_cuda(),     "run it on device cpu"};
}

std::vector<float> Transformer::prefill(std::span<const int32_t> tokens, int32_t dtype,
                                        int num_queries, const Take& take) {
  const int64_t T = std::ssize(tokens);
  if (T == 0) throw Error("the prompt is empty: give at least 1 token");
  if (T > config().max_positions) {
    throw Error("the prompt has {} tokens, but {} is made for {}: give a shorter prompt", T,
                config().name, config().max_positions);
  }
  SIKV_ASSERT(dtype == SIKV_FP16 || dtype == SIKV_FP32);
  for (const int32_t token : tokens) check_token(token);
  backend_->begin_prefill(tokens, dtype, num_queries);
  const int64_t chunk = backend_->chunk_tokens();
  for (int l = 0; l < config().num_layers; ++l) {
    for (int64_t first = 0; first < T; first += chunk) {
      check_interrupt();
      backend_->prefill_chunk(l, first, std::min(chunk, T - first));
    }
    take(l, backend_->prefilled(l));
  }
  return backend_->end_prefill();
}

Prompt Transformer::prefill(std::span<const int32_t> tokens, int32_t dtype, int num_queries) {
  Prompt prompt;
  Progress progress("prefill", config().num_layers);
  const auto kept = [&](const void* rows, int64_t count, int64_t width) {
    std::vector<std::byte> copy(static_cast<size_t>(count * width * sikv_dtype_bytes(dtype)));
    device_.copy_out(copy.data(), rows, copy.size());
    return copy;
  };
  prompt.hidden = prefill(tokens, dtype, num_queries, [&](int, const PromptRows& rows) {
    prompt.layers.push_back({kept(rows.k, rows.tokens, kv_width()),
                             kept(rows.v, rows.tokens, kv_width()),
                             kept(rows.q, rows.queries, q_width())});
    progress.add();
  });
  return prompt;
}

void Transformer::fill(Pipeline& pipeline, int layer, const PromptRows& prompt, int num_queries) {
  const sikv_cache_view& view = pipeline.cache().view(layer);
  const uint32_t needs = pipeline.composition().selector().table().flags;
  const bool all_queries = (needs & SIKV_SELECTOR_NEEDS_ALL_QUERIES) != 0;
  const int seen = all_queries ? prompt.queries : std::min(num_queries, prompt.queries);
  const int64_t row_bytes = q_width() * sikv_dtype_bytes(view.dtype);
  const int64_t query_bytes = seen * row_bytes;
  const auto sequences = static_cast<size_t>(view.num_sequences);
  const auto tokens = static_cast<int32_t>(prompt.tokens);
  const std::vector<int32_t> first(sequences, 0), count(sequences, tokens);
  const sikv_rows keys{prompt.k,     view.dtype, tokens,           first.data(),
                       count.data(), kv_width(), config().head_dim};
  sikv_rows values = keys;
  values.data = prompt.v;
  DeviceBuffer repeated;
  const void* const last =
      static_cast<const std::byte*>(prompt.q) + (prompt.queries - seen) * row_bytes;
  const void* queries = last;
  if (sequences > 1) {
    repeated = DeviceBuffer(device_, sequences * static_cast<size_t>(query_bytes));
    for (size_t b = 0; b < sequences; ++b) {
      device_.copy_in(repeated.as<std::byte>() + static_cast<int64_t>(b) * query_bytes, last,
                      static_cast<size_t>(query_bytes));
    }
    queries = repeated.as<>();
  }
  std::vector<float> w_o;
  OutputProjection projection;
  if ((needs & SIKV_SELECTOR_NEEDS_W_O) != 0) {
    w_o = output_projection(layer);
    if (!w_o.empty()) projection = {w_o.data(), static_cast<int>(config().hidden_size)};
  }
  pipeline.prefill(layer, keys, values, queries, seen, projection);
}

void Transformer::fill(Pipeline& pipeline, int layer, const PromptLayer& prompt, int num_queries) {
  const int64_t bytes = sikv_dtype_bytes(pipeline.cache().view(layer).dtype);
  fill(pipeline, layer,
       PromptRows{prompt.k.data(), prompt.v.data(), prompt.q.data(),
                  std::ssize(prompt.k) / (kv_width() * bytes),
                  static_cast<int>(std::ssize(prompt.q) / (q_width() * bytes))},
       num_queries);
}

void Transformer::fill(Pipeline& pipeline, const Prompt& prompt) {
  for (int l = 0; l < config().num_layers; ++l) {
    fill(pipeline, l, prompt.layers[static_cast<size_t>(l)]);
  }
}

void Transformer::check_step(std::span<const int32_t> tokens,
                             std::span<const int64_t> positions) const {
  SIKV_ASSERT(tokens.size() == positions.size());
  for (const int64_t position : positions) {
    if (position >= config().max_positions) {
      throw Error("position {} lies beyond the context of {}, which is {}", position, config().name,
                  config().max_positions);
    }
  }
  for (const int32_t token : tokens) check_token(token);
}

void Transformer::step(Pipeline& pipeline, std::span<const int32_t> tokens,
                       std::span<const int64_t> positions, float* logits, Pipeline::StepMode mode) {
  check_step(tokens, positions);
  backend_->step(&pipeline, tokens, positions, mode, logits, nullptr);
}

void Transformer::step_greedy(Pipeline& pipeline, std::span<const int32_t> tokens,
                              std::span<const int64_t> positions, int32_t* next) {
  check_step(tokens, positions);
  backend_->step(&pipeline, tokens, positions, Pipeline::StepMode::kRecorded, nullptr, next);
}

void Transformer::step_without_cache(std::span<const int32_t> tokens,
                                     std::span<const int64_t> positions, int32_t* next) {
  check_step(tokens, positions);
  backend_->step(nullptr, tokens, positions, Pipeline::StepMode::kRecorded, nullptr, next);
}

void Transformer::logits(const float* hidden, int64_t n, float* logits) {
  backend_->logits(hidden, n, logits);
}

}  // namespace sikv
