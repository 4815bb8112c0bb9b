// A Llama-type model on the CPU: dense prefill, then decode steps whose attention is a pipeline's.
//
//   h       = rms_norm(x) * attention_norm
//   q, k, v = h . wq^T + bq, ...           q and k normed per head where the model does that, then
//                                          rotated by position
//   x       = x + attention(q, k, v) . wo^T
//   h       = rms_norm(x) * mlp_norm
//   x       = x + (silu(h . w_gate^T) * (h . w_up^T)) . w_down^T
//   logits  = rms_norm(x) * norm . unembedding^T
//
// Arithmetic is fp32, rotation angles are fp64.
#ifndef SIKV_FRAMEWORK_MODEL_TRANSFORMER_H_
#define SIKV_FRAMEWORK_MODEL_TRANSFORMER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "framework/device/device.h"
#include "framework/model/model_file.h"
#include "framework/model/rope.h"
#include "framework/pipeline/offer.h"
#include "framework/pipeline/pipeline.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {

// What attention of one layer gets from a prompt of T tokens, in the cache's element type.
struct PromptLayer {
  std::vector<std::byte> k, v;  // [T, Hkv, D]
  std::vector<std::byte> q;     // [W, Hq, D], the last W positions
};

// A prompt after its dense prefill; serves any number of pipelines.
struct Prompt {
  std::vector<PromptLayer> layers;
  std::vector<float> hidden;  // [hidden] of the last token behind the last layer
};

class Transformer {
 public:
  Transformer(ModelFile model, Device& device);

  const ModelConfig& config() const { return model_.config; }
  const Vocabulary& vocabulary() const { return model_.vocabulary; }
  // Bytes of weights that one decode step reads.
  uint64_t step_bytes() const;
  // What a pipeline for this model is made with.
  sikv_shape shape(int32_t dtype, int64_t max_tokens, int batch = 1) const;

  // What selectors get of a prompt of `tokens`: the last `num_queries` queries, and no w_o.
  Offer offer(int64_t tokens, int num_queries) const;

  // Dense causal attention over `tokens` at positions from 0; K, V and the last `num_queries`
  // queries of each layer go to `take`. Returns the hidden state of the last token behind the last
  // layer. `dtype` fp16 or fp32. Errors name a token that is none, a prompt longer than the model's
  // context, and the first layer that gives a NaN.
  using Take = std::function<void(int layer, PromptLayer&&)>;
  std::vector<float> prefill(std::span<const int32_t> tokens, int32_t dtype, int num_queries,
                             const Take& take);
  // The same, all kept. Shows progress.
  Prompt prefill(std::span<const int32_t> tokens, int32_t dtype, int num_queries);

  // Hands one layer of a prompt to a pipeline: each of its sequences begins with it.
  void fill(Pipeline& pipeline, int layer, const PromptLayer& prompt) const;
  void fill(Pipeline& pipeline, const Prompt& prompt) const;

  // One token per sequence of the pipeline, at its position, through all layers: `logits`
  // [B, vocab] are those of the next tokens.
  void step(Pipeline& pipeline, std::span<const int32_t> tokens, std::span<const int64_t> positions,
            float* logits);

  // The same without attention and cache: the time that no pipeline can go below.
  void step_without_cache(std::span<const int32_t> tokens, std::span<const int64_t> positions,
                          float* logits);

  // logits [n, vocab] from hidden states [n, hidden] behind the last layer.
  void logits(const float* hidden, int64_t n, float* logits);

 private:
  int64_t q_width() const { return int64_t{config().num_query_heads} * config().head_dim; }
  int64_t kv_width() const { return int64_t{config().num_kv_heads} * config().head_dim; }

  // q [n, Hq, D], k and v [n, Hkv, D] -> out [n, Hq, D]
  using Attend =
      std::function<void(int layer, const std::vector<float>& q, const std::vector<float>& k,
                         const std::vector<float>& v, std::vector<float>& out)>;
  void decode(std::span<const int32_t> tokens, std::span<const int64_t> positions,
              const Attend& attend, float* logits);

  void check_token(int32_t token) const;
  void check_hidden(int layer, const float* x, std::span<const int64_t> positions) const;
  void embed(std::span<const int32_t> tokens, float* x);
  void project(const ModelLayer& layer, const float* x, std::span<const int64_t> positions,
               float* q, float* k, float* v);
  void finish_layer(const ModelLayer& layer, const float* attention, int64_t n, float* x);
  void dense_attention(const float* q, const float* k, const float* v, int64_t first, int64_t n,
                       float* out);

  ModelFile model_;
  Device& device_;
  Rope rope_;
  std::vector<float> normed_, gate_, up_, delta_;  // scratch of one call
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_TRANSFORMER_H_
