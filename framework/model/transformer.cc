#include "framework/model/transformer.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/interrupt.h"
#include "framework/base/progress.h"
#include "framework/device/parallel.h"
#include "framework/model/vector_math.h"

namespace sikv {
namespace {

// Tokens of a prompt that go through a layer together: activations stay small at any length, and
// BLAS has its full speed long before.
constexpr int64_t kChunkTokens = 1024;

// A task of dense attention takes kQueryBlock positions of the query heads of one KV head and goes
// through the keys by kKeyBlock, so that its scores (G x 64 x 512 floats) stay in the L2 cache.
constexpr int64_t kQueryBlock = 64, kKeyBlock = 512;

blasint blas(int64_t value) { return static_cast<blasint>(value); }

// out = x / sqrt(mean(x^2) + eps) * weight; in place if out == x.
void rms_norm(const float* x, const float* weight, int64_t n, double eps, float* out) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  const float scale = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(n) + eps));
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

float* sized(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

const float* bias_of(const std::vector<float>& bias) {
  return bias.empty() ? nullptr : bias.data();
}

// x [n] in the cache's element type. `what` it is, for the message where that cannot hold it.
std::vector<std::byte> narrowed(const float* x, int64_t n, int32_t dtype, char what, int layer) {
  std::vector<std::byte> stored(static_cast<size_t>(n * sikv_dtype_bytes(dtype)));
  for (int64_t i = 0; i < n; ++i) {
    sikv_store(stored.data(), dtype, i, x[i]);
    if (!std::isfinite(x[i])) {
      throw Error(
          "{} of layer {} holds a NaN or infinity, the first in the model: check the weights, or "
          "export them as fp32",
          what, layer);
    }
    if (!std::isfinite(sikv_load(stored.data(), dtype, i))) {
      throw Error("{} of layer {} holds {}, which fp16 cannot: give caches fp32", what, layer,
                  x[i]);
    }
  }
  return stored;
}

// Softmax attention of rows [rows, D] (already scaled) that see a growing set of keys, by blocks.
class OnlineAttention {
 public:
  OnlineAttention(int64_t rows, int64_t head_dim)
      : rows_(rows),
        head_dim_(head_dim),
        q_(static_cast<size_t>(rows * head_dim)),
        out_(static_cast<size_t>(rows * head_dim)),
        scores_(static_cast<size_t>(rows * kKeyBlock)),
        highest_(static_cast<size_t>(rows)),
        sum_(static_cast<size_t>(rows)) {}

  float* query(int64_t row) { return q_.data() + row * head_dim_; }
  // out [D] of a row.
  void finish(int64_t row, float* out) const {
    const float scale = 1 / sum_[static_cast<size_t>(row)];
    for (int64_t d = 0; d < head_dim_; ++d) out[d] = out_[row * head_dim_ + d] * scale;
  }

  void reset() {
    std::fill(out_.begin(), out_.end(), 0.0f);
    std::fill(sum_.begin(), sum_.end(), 0.0f);
    std::fill(highest_.begin(), highest_.end(), -std::numeric_limits<float>::infinity());
  }

  // Adds keys and values [count, D] with row stride `stride`; row r sees the first visible(r).
  template <typename Visible>
  void add(const float* keys, const float* values, int64_t stride, int64_t count, int64_t rows,
           Visible&& visible) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, blas(rows), blas(count), blas(head_dim_),
                1.0f, q_.data(), blas(head_dim_), keys, blas(stride), 0.0f, scores_.data(),
                blas(count));
    for (int64_t r = 0; r < rows; ++r) {
      float* const score = scores_.data() + r * count;
      const int64_t seen = std::clamp<int64_t>(visible(r), 0, count);
      std::fill(score + seen, score + count, 0.0f);
      if (seen == 0) continue;
      const size_t at = static_cast<size_t>(r);
      const float highest = std::max(highest_[at], vector_math::largest(score, seen));
      const float fade = std::exp(highest_[at] - highest);
      if (fade != 1) {
        for (int64_t d = 0; d < head_dim_; ++d) out_[r * head_dim_ + d] *= fade;
      }
      highest_[at] = highest;
      sum_[at] = sum_[at] * fade + vector_math::exp_minus(score, seen, highest);
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, blas(rows), blas(head_dim_), blas(count),
                1.0f, scores_.data(), blas(count), values, blas(stride), 1.0f, out_.data(),
                blas(head_dim_));
  }

 private:
  int64_t rows_, head_dim_;
  std::vector<float> q_, out_;  // [rows, D]
  std::vector<float> scores_;   // [rows, kKeyBlock]
  std::vector<float> highest_, sum_;
};

}  // namespace

Transformer::Transformer(ModelFile model, Device& device)
    : model_(std::move(model)),
      device_(device),
      rope_(model_.config.head_dim, model_.config.rope_theta, model_.config.rope_scaling) {
  // The device's workers each call BLAS on a part of the work; threads of its own would compete.
  openblas_set_num_threads(1);
}

uint64_t Transformer::step_bytes() const {
  uint64_t bytes = model_.unembedding().bytes();
  for (const ModelLayer& layer : model_.layers) {
    for (const WeightMatrix* matrix :
         {&layer.wq, &layer.wk, &layer.wv, &layer.wo, &layer.w_gate, &layer.w_up, &layer.w_down}) {
      bytes += matrix->bytes();
    }
  }
  return bytes;
}

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

void Transformer::check_token(int32_t token) const {
  if (token < 0 || token >= config().vocab_size) {
    throw Error(
        "token {} is not in the vocabulary of {}, which has {} tokens: was the text "
        "tokenised for another model?",
        token, config().name, config().vocab_size);
  }
}

void Transformer::check_hidden(int layer, const float* x,
                               std::span<const int64_t> positions) const {
  for (const int64_t position : positions) {
    // Any NaN or infinity makes the sum one.
    const float sum = std::accumulate(x, x + config().hidden_size, 0.0f);
    if (!std::isfinite(sum)) {
      throw Error(
          "layer {} of {} gives a NaN or infinity at position {}, the first to do so: check "
          "the weights, or export them as fp32",
          layer, config().name, position);
    }
    x += config().hidden_size;
  }
}

void Transformer::embed(std::span<const int32_t> tokens, float* x) {
  for (const int32_t token : tokens) {
    check_token(token);
    load_weights(model_.embedding, token, x);
    x += config().hidden_size;
  }
}

void Transformer::project(const ModelLayer& layer, const float* x,
                          std::span<const int64_t> positions, float* q, float* k, float* v) {
  const int64_t n = static_cast<int64_t>(positions.size()), hidden = config().hidden_size;
  const int D = config().head_dim;
  const double eps = config().rms_norm_eps;
  float* const normed = sized(normed_, n * hidden);
  parallel_for(device_, n, [&](int64_t i, int) {
    rms_norm(x + i * hidden, layer.attention_norm.data(), hidden, eps, normed + i * hidden);
  });
  const Product products[] = {{&layer.wq, bias_of(layer.bq), q},
                              {&layer.wk, bias_of(layer.bk), k},
                              {&layer.wv, bias_of(layer.bv), v}};
  multiply(device_, products, normed, n);
  parallel_for(device_, n, [&](int64_t i, int) {
    float* const q_i = q + i * q_width();
    float* const k_i = k + i * kv_width();
    for (int h = 0; h < config().num_query_heads && !layer.q_norm.empty(); ++h) {
      rms_norm(q_i + h * D, layer.q_norm.data(), D, eps, q_i + h * D);
    }
    for (int h = 0; h < config().num_kv_heads && !layer.k_norm.empty(); ++h) {
      rms_norm(k_i + h * D, layer.k_norm.data(), D, eps, k_i + h * D);
    }
    float turn[kLargestHeadDim];
    rope_.turn(positions[static_cast<size_t>(i)], turn);
    Rope::rotate(turn, config().num_query_heads, D, q_i);
    Rope::rotate(turn, config().num_kv_heads, D, k_i);
  });
}

void Transformer::finish_layer(const ModelLayer& layer, const float* attention, int64_t n,
                               float* x) {
  const int64_t hidden = config().hidden_size, intermediate = config().intermediate_size;
  float* const delta = sized(delta_, n * hidden);
  float* const normed = sized(normed_, n * hidden);
  float* const gate = sized(gate_, n * intermediate);
  float* const up = sized(up_, n * intermediate);
  const Product out[] = {{&layer.wo, nullptr, delta}};
  multiply(device_, out, attention, n);
  parallel_for(device_, n, [&](int64_t i, int) {
    float* const x_i = x + i * hidden;
    for (int64_t c = 0; c < hidden; ++c) x_i[c] += delta[i * hidden + c];
    rms_norm(x_i, layer.mlp_norm.data(), hidden, config().rms_norm_eps, normed + i * hidden);
  });
  const Product gate_up[] = {{&layer.w_gate, nullptr, gate}, {&layer.w_up, nullptr, up}};
  multiply(device_, gate_up, normed, n);
  parallel_for(device_, n, [&](int64_t i, int) {
    vector_math::silu_multiply(gate + i * intermediate, up + i * intermediate, intermediate);
  });
  const Product down[] = {{&layer.w_down, nullptr, delta}};
  multiply(device_, down, gate, n);
  for (int64_t i = 0; i < n * hidden; ++i) x[i] += delta[i];
}

// q, out [n, Hq, D] at positions first ..; k, v [first + n, Hkv, D].
void Transformer::dense_attention(const float* q, const float* k, const float* v, int64_t first,
                                  int64_t n, float* out) {
  const int64_t D = config().head_dim, heads = config().num_kv_heads;
  const int64_t group = config().num_query_heads / heads;
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  const int64_t blocks = (n + kQueryBlock - 1) / kQueryBlock;
  std::vector<OnlineAttention> workers(static_cast<size_t>(device_.info().num_threads),
                                       OnlineAttention(group * kQueryBlock, D));
  parallel_for(device_, blocks * heads, [&](int64_t task, int worker) {
    OnlineAttention& attention = workers[static_cast<size_t>(worker)];
    const int64_t h = task % heads;
    // The last block is the largest: it goes first.
    const int64_t from = (blocks - 1 - task / heads) * kQueryBlock;
    const int64_t count = std::min(kQueryBlock, n - from);
    const auto element = [&](int64_t row) {  // rows are [G, count]
      return (from + row % count) * q_width() + (h * group + row / count) * D;
    };
    attention.reset();
    for (int64_t row = 0; row < group * count; ++row) {
      float* const to = attention.query(row);
      for (int64_t d = 0; d < D; ++d) to[d] = q[element(row) + d] * scale;
    }
    const int64_t end = first + from + count;
    for (int64_t key = 0; key < end; key += kKeyBlock) {
      attention.add(k + key * kv_width() + h * D, v + key * kv_width() + h * D, kv_width(),
                    std::min(kKeyBlock, end - key), group * count,
                    [&](int64_t row) { return first + from + row % count + 1 - key; });
    }
    for (int64_t row = 0; row < group * count; ++row) attention.finish(row, out + element(row));
  });
}

Offer Transformer::offer(int64_t tokens, int num_queries) const {
  return {"a model's own prompt", config().num_layers, config().num_layers,
          std::max<int64_t>(0, tokens - num_queries), false};
}

std::vector<float> Transformer::prefill(std::span<const int32_t> tokens, int32_t dtype,
                                        int num_queries, const Take& take) {
  const int64_t T = static_cast<int64_t>(tokens.size()), hidden = config().hidden_size;
  if (T == 0) throw Error("the prompt is empty: give at least 1 token");
  if (T > config().max_positions) {
    throw Error("the prompt has {} tokens, but {} is made for {}: give a shorter prompt", T,
                config().name, config().max_positions);
  }
  SIKV_ASSERT(dtype == SIKV_FP16 || dtype == SIKV_FP32);
  const int64_t kept = std::min<int64_t>(num_queries, T);
  std::vector<float> x(static_cast<size_t>(T * hidden));
  embed(tokens, x.data());
  std::vector<int64_t> positions(static_cast<size_t>(T));
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<float> k(static_cast<size_t>(T * kv_width())), v(k.size());
  std::vector<float> q(static_cast<size_t>(std::min(kChunkTokens, T) * q_width()));
  std::vector<float> attention(q.size()), last_q(static_cast<size_t>(kept * q_width()));
  for (int l = 0; l < config().num_layers; ++l) {
    const ModelLayer& layer = model_.layers[static_cast<size_t>(l)];
    for (int64_t first = 0; first < T; first += kChunkTokens) {
      check_interrupt();
      const int64_t n = std::min(kChunkTokens, T - first);
      const auto at =
          std::span(positions).subspan(static_cast<size_t>(first), static_cast<size_t>(n));
      float* const x_n = x.data() + first * hidden;
      project(layer, x_n, at, q.data(), k.data() + first * kv_width(),
              v.data() + first * kv_width());
      for (int64_t i = std::max<int64_t>(0, T - kept - first); i < n; ++i) {
        std::copy_n(q.data() + i * q_width(), q_width(),
                    last_q.data() + (first + i - (T - kept)) * q_width());
      }
      dense_attention(q.data(), k.data(), v.data(), first, n, attention.data());
      finish_layer(layer, attention.data(), n, x_n);
      check_hidden(l, x_n, at);
    }
    take(l, {narrowed(k.data(), T * kv_width(), dtype, 'K', l),
             narrowed(v.data(), T * kv_width(), dtype, 'V', l),
             narrowed(last_q.data(), kept * q_width(), dtype, 'Q', l)});
  }
  return {x.end() - static_cast<ptrdiff_t>(hidden), x.end()};
}

Prompt Transformer::prefill(std::span<const int32_t> tokens, int32_t dtype, int num_queries) {
  Prompt prompt;
  Progress progress("prefill", config().num_layers);
  prompt.hidden = prefill(tokens, dtype, num_queries, [&](int, PromptLayer&& layer) {
    prompt.layers.push_back(std::move(layer));
    progress.add();
  });
  return prompt;
}

void Transformer::fill(Pipeline& pipeline, int layer, const PromptLayer& prompt) const {
  const sikv_cache_view& view = pipeline.cache().view(layer);
  const int64_t bytes = sikv_dtype_bytes(view.dtype);
  const auto sequences = static_cast<size_t>(view.num_sequences);
  const auto tokens = static_cast<int32_t>(std::ssize(prompt.k) / (kv_width() * bytes));
  const std::vector<int32_t> first(sequences, 0), count(sequences, tokens);
  const sikv_rows keys{prompt.k.data(), view.dtype, tokens,           first.data(),
                       count.data(),    kv_width(), config().head_dim};
  sikv_rows values = keys;
  values.data = prompt.v.data();
  const std::vector<std::byte>* queries = &prompt.q;
  std::vector<std::byte> repeated;
  if (sequences > 1) {
    for (size_t b = 0; b < sequences; ++b) {
      repeated.insert(repeated.end(), prompt.q.begin(), prompt.q.end());
    }
    queries = &repeated;
  }
  pipeline.prefill(layer, keys, values, queries->data(),
                   static_cast<int>(std::ssize(prompt.q) / (q_width() * bytes)));
}

void Transformer::fill(Pipeline& pipeline, const Prompt& prompt) const {
  for (int l = 0; l < config().num_layers; ++l) {
    fill(pipeline, l, prompt.layers[static_cast<size_t>(l)]);
  }
}

void Transformer::step(Pipeline& pipeline, std::span<const int32_t> tokens,
                       std::span<const int64_t> positions, float* logits) {
  const int32_t dtype = pipeline.cache().view(0).dtype;
  std::vector<float> lse(tokens.size() * static_cast<size_t>(config().num_query_heads));
  pipeline.begin_step();
  const auto narrow = [&](const std::vector<float>& x, char what, int layer) {
    return narrowed(x.data(), std::ssize(x), dtype, what, layer);
  };
  decode(
      tokens, positions,
      [&](int l, const std::vector<float>& q, const std::vector<float>& k,
          const std::vector<float>& v, std::vector<float>& out) {
        pipeline.append(l, narrow(k, 'K', l).data(), narrow(v, 'V', l).data());
        pipeline.attend(l, narrow(q, 'Q', l).data(), out.data(), lse.data());
      },
      logits);
}

void Transformer::step_without_cache(std::span<const int32_t> tokens,
                                     std::span<const int64_t> positions, float* logits) {
  decode(
      tokens, positions,
      [](int, const std::vector<float>&, const std::vector<float>&, const std::vector<float>&,
         std::vector<float>& out) { std::fill(out.begin(), out.end(), 0.0f); },
      logits);
}

void Transformer::decode(std::span<const int32_t> tokens, std::span<const int64_t> positions,
                         const Attend& attend, float* logits) {
  const int64_t n = static_cast<int64_t>(tokens.size()), hidden = config().hidden_size;
  for (const int64_t position : positions) {
    if (position >= config().max_positions) {
      throw Error("position {} lies beyond the context of {}, which is {}", position, config().name,
                  config().max_positions);
    }
  }
  std::vector<float> x(static_cast<size_t>(n * hidden));
  std::vector<float> q(static_cast<size_t>(n * q_width())), attention(q.size());
  std::vector<float> k(static_cast<size_t>(n * kv_width())), v(k.size());
  embed(tokens, x.data());
  for (int l = 0; l < config().num_layers; ++l) {
    const ModelLayer& layer = model_.layers[static_cast<size_t>(l)];
    project(layer, x.data(), positions, q.data(), k.data(), v.data());
    attend(l, q, k, v, attention);
    finish_layer(layer, attention.data(), n, x.data());
    check_hidden(l, x.data(), positions);
  }
  this->logits(x.data(), n, logits);
}

void Transformer::logits(const float* hidden, int64_t n, float* logits) {
  const int64_t width = config().hidden_size;
  float* const normed = sized(normed_, n * width);
  for (int64_t i = 0; i < n; ++i) {
    rms_norm(hidden + i * width, model_.norm.data(), width, config().rms_norm_eps,
             normed + i * width);
  }
  const Product out[] = {{&model_.unembedding(), nullptr, logits}};
  multiply(device_, out, normed, n);
  if (!std::all_of(logits, logits + n * config().vocab_size,
                   [](float logit) { return std::isfinite(logit); })) {
    throw Error(
        "the output layer of {} gives a NaN or infinity although every layer before it is "
        "finite: check norm and output, or export them as fp32",
        config().name);
  }
}

}  // namespace sikv
