#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "framework/base/error.h"
#include "framework/device/parallel.h"
#include "framework/model/backend.h"
#include "framework/model/rope.h"
#include "framework/model/vector_math.h"
#include "plugins/abi/sikv_abi.h"

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

class CpuBackend final : public ModelBackend {
 public:
  CpuBackend(const ModelFile& model, Device& device)
      : model_(model),
        device_(device),
        rope_(model.config.head_dim, model.config.rope_theta, model.config.rope_scaling) {
    // The device's workers each call BLAS on a part of the work; threads of its own would compete.
    openblas_set_num_threads(1);
  }

  uint64_t step_bytes() const override;
  int64_t chunk_tokens() const override { return kChunkTokens; }
  uint64_t prefill_bytes(int64_t, int32_t) const override { return 0; }
  void begin_prefill(std::span<const int32_t> tokens, int32_t dtype, int queries) override;
  void prefill_chunk(int layer, int64_t first, int64_t count) override;
  PromptRows prefilled(int layer) override;
  std::vector<float> end_prefill() override;
  void step(Pipeline* pipeline, std::span<const int32_t> tokens, std::span<const int64_t> positions,
            Pipeline::StepMode mode, float* logits, int32_t* next) override;
  std::vector<float> output_projection(int layer) const override;
  void logits(const float* hidden, int64_t n, float* logits) override;

 private:
  // Of one prefill.
  struct Prefill {
    int32_t dtype = SIKV_FP16;
    int64_t tokens = 0, kept = 0;
    std::vector<int64_t> positions;
    std::vector<float> x, k, v;       // [tokens, ..]
    std::vector<float> q, attention;  // [chunk, Hq, D]
    std::vector<float> last_q;        // [kept, Hq, D]
    std::vector<std::byte> rows_k, rows_v, rows_q;
  };

  const ModelConfig& config() const { return model_.config; }
  int64_t q_width() const { return int64_t{config().num_query_heads} * config().head_dim; }
  int64_t kv_width() const { return int64_t{config().num_kv_heads} * config().head_dim; }
  void check_hidden(int layer, const float* x, std::span<const int64_t> positions) const;
  void embed(std::span<const int32_t> tokens, float* x);
  void project(const ModelLayer& layer, const float* x, std::span<const int64_t> positions,
               float* q, float* k, float* v);
  void finish_layer(const ModelLayer& layer, const float* attention, int64_t n, float* x);
  void dense_attention(const float* q, const float* k, const float* v, int64_t first, int64_t n,
                       float* out);

  const ModelFile& model_;
  Device& device_;
  Rope rope_;
  Prefill prefill_;
  std::vector<float> normed_, gate_, up_, delta_;  // scratch of one call
};

uint64_t CpuBackend::step_bytes() const {
  uint64_t bytes = model_.unembedding().bytes();
  for (const ModelLayer& layer : model_.layers) {
    for (const WeightMatrix* matrix : matrices(layer)) bytes += matrix->bytes();
  }
  return bytes;
}

void CpuBackend::check_hidden(int layer, const float* x, std::span<const int64_t> positions) const {
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

void CpuBackend::embed(std::span<const int32_t> tokens, float* x) {
  for (const int32_t token : tokens) {
    load_weights(model_.embedding, token, x);
    x += config().hidden_size;
  }
}

void CpuBackend::project(const ModelLayer& layer, const float* x,
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

void CpuBackend::finish_layer(const ModelLayer& layer, const float* attention, int64_t n,
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
void CpuBackend::dense_attention(const float* q, const float* k, const float* v, int64_t first,
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

void CpuBackend::begin_prefill(std::span<const int32_t> tokens, int32_t dtype, int queries) {
  const size_t T = tokens.size();
  const size_t chunk = std::min(static_cast<size_t>(kChunkTokens), T);
  prefill_ = {};
  prefill_.dtype = dtype;
  prefill_.tokens = std::ssize(tokens);
  prefill_.kept = std::min<int64_t>(queries, prefill_.tokens);
  prefill_.positions.resize(T);
  std::iota(prefill_.positions.begin(), prefill_.positions.end(), 0);
  prefill_.x.resize(T * static_cast<size_t>(config().hidden_size));
  prefill_.k.resize(T * static_cast<size_t>(kv_width()));
  prefill_.v.resize(prefill_.k.size());
  prefill_.q.resize(chunk * static_cast<size_t>(q_width()));
  prefill_.attention.resize(prefill_.q.size());
  prefill_.last_q.resize(static_cast<size_t>(prefill_.kept * q_width()));
  embed(tokens, prefill_.x.data());
}

void CpuBackend::prefill_chunk(int l, int64_t first, int64_t n) {
  Prefill& p = prefill_;
  const ModelLayer& layer = model_.layers[static_cast<size_t>(l)];
  const auto at =
      std::span(p.positions).subspan(static_cast<size_t>(first), static_cast<size_t>(n));
  float* const x_n = p.x.data() + first * config().hidden_size;
  project(layer, x_n, at, p.q.data(), p.k.data() + first * kv_width(),
          p.v.data() + first * kv_width());
  const int64_t unkept = p.tokens - p.kept;
  for (int64_t i = std::max<int64_t>(0, unkept - first); i < n; ++i) {
    std::copy_n(p.q.data() + i * q_width(), q_width(),
                p.last_q.data() + (first + i - unkept) * q_width());
  }
  dense_attention(p.q.data(), p.k.data(), p.v.data(), first, n, p.attention.data());
  finish_layer(layer, p.attention.data(), n, x_n);
  check_hidden(l, x_n, at);
}

PromptRows CpuBackend::prefilled(int layer) {
  Prefill& p = prefill_;
  p.rows_k = narrowed(p.k.data(), std::ssize(p.k), p.dtype, 'K', layer);
  p.rows_v = narrowed(p.v.data(), std::ssize(p.v), p.dtype, 'V', layer);
  p.rows_q = narrowed(p.last_q.data(), std::ssize(p.last_q), p.dtype, 'Q', layer);
  return {p.rows_k.data(), p.rows_v.data(), p.rows_q.data(), p.tokens, static_cast<int>(p.kept)};
}

std::vector<float> CpuBackend::end_prefill() {
  const std::vector<float> hidden(prefill_.x.end() - static_cast<ptrdiff_t>(config().hidden_size),
                                  prefill_.x.end());
  prefill_ = {};
  return hidden;
}

std::vector<float> CpuBackend::output_projection(int layer) const {
  const WeightMatrix& wo = model_.layers[static_cast<size_t>(layer)].wo;  // [hidden, Hq * D]
  std::vector<float> row(static_cast<size_t>(wo.columns)),
      w_o(row.size() * static_cast<size_t>(wo.rows));
  for (int64_t c = 0; c < wo.rows; ++c) {
    load_weights(wo, c, row.data());
    for (int64_t i = 0; i < wo.columns; ++i)
      w_o[static_cast<size_t>(i * wo.rows + c)] = row[static_cast<size_t>(i)];
  }
  return w_o;
}

void CpuBackend::step(Pipeline* pipeline, std::span<const int32_t> tokens,
                      std::span<const int64_t> positions, Pipeline::StepMode, float* logits,
                      int32_t* next) {
  const int64_t n = std::ssize(tokens), hidden = config().hidden_size;
  std::vector<float> x(static_cast<size_t>(n * hidden));
  std::vector<float> q(static_cast<size_t>(n * q_width())), attention(q.size());
  std::vector<float> k(static_cast<size_t>(n * kv_width())), v(k.size());
  std::vector<float> lse(static_cast<size_t>(n * config().num_query_heads));
  if (pipeline != nullptr) pipeline->begin_step();
  embed(tokens, x.data());
  for (int l = 0; l < config().num_layers; ++l) {
    const ModelLayer& layer = model_.layers[static_cast<size_t>(l)];
    project(layer, x.data(), positions, q.data(), k.data(), v.data());
    if (pipeline != nullptr) {
      const int32_t dtype = pipeline->cache().view(0).dtype;
      const auto narrow = [&](const std::vector<float>& part, char what) {
        return narrowed(part.data(), std::ssize(part), dtype, what, l);
      };
      pipeline->append(l, narrow(k, 'K').data(), narrow(v, 'V').data());
      pipeline->attend(l, narrow(q, 'Q').data(), attention.data(), lse.data());
    }
    finish_layer(layer, attention.data(), n, x.data());
    check_hidden(l, x.data(), positions);
  }
  const int64_t vocab = config().vocab_size;
  std::vector<float> own;
  if (logits == nullptr) {
    own.resize(static_cast<size_t>(n * vocab));
    logits = own.data();
  }
  this->logits(x.data(), n, logits);
  for (int64_t i = 0; i < n && next != nullptr; ++i) {
    const float* const of = logits + i * vocab;
    next[i] = static_cast<int32_t>(std::max_element(of, of + vocab) - of);
  }
}

void CpuBackend::logits(const float* hidden, int64_t n, float* logits) {
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

}  // namespace

std::unique_ptr<ModelBackend> make_cpu_backend(const ModelFile& model, Device& device) {
  return std::make_unique<CpuBackend>(model, device);
}

}  // namespace sikv
