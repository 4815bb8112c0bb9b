// A Llama-type model on a device: dense prefill, then decode steps whose attention is a pipeline's
// on the same kind of device.
//
//   h       = rms_norm(x) * attention_norm
//   q, k, v = h . wq^T + bq, ...           q and k normed per head where the model does that, then
//                                          rotated by position
//   x       = x + attention(q, k, v) . wo^T
//   h       = rms_norm(x) * mlp_norm
//   x       = x + (silu(h . w_gate^T) * (h . w_up^T)) . w_down^T
//   logits  = rms_norm(x) * norm . unembedding^T
//
// On the CPU arithmetic is fp32. On a GPU products take weights and activations in the model's type
// (fp32, fp16 or bf16; int8 becomes fp16) and add in fp32; the residual x, norms and rotation are
// fp32. Rotation angles are fp64.
#ifndef SIKV_FRAMEWORK_MODEL_TRANSFORMER_H_
#define SIKV_FRAMEWORK_MODEL_TRANSFORMER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "framework/device/device.h"
#include "framework/model/backend.h"
#include "framework/model/model_file.h"
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

  const ModelConfig& config() const { return model_->config; }
  const Vocabulary& vocabulary() const { return model_->vocabulary; }
  Device& device() const { return device_; }
  // Bytes of weights that one decode step reads.
  uint64_t step_bytes() const { return backend_->step_bytes(); }
  // Device memory that a prefill takes beside caches; 0 on the CPU.
  uint64_t prefill_bytes(int64_t tokens, int32_t dtype) const {
    return backend_->prefill_bytes(tokens, dtype);
  }
  // What a pipeline for this model is made with.
  sikv_shape shape(int32_t dtype, int64_t max_tokens, int batch = 1) const;
  std::vector<int> layer_numbers() const;  // all

  // What selectors get of a prompt of `tokens`: the last `num_queries` queries and, on a CPU, w_o.
  Offer offer(int64_t tokens, int num_queries) const;

  // Dense causal attention over `tokens` at positions from 0; K, V and the last `num_queries`
  // queries of each layer go to `take`, which must be done with them when it returns. Returns the
  // hidden state of the last token behind the last layer. `dtype` fp16 or fp32. Errors name a token
  // that is none, a prompt longer than the model's context, and the first layer that gives a NaN.
  using Take = std::function<void(int layer, const PromptRows&)>;
  std::vector<float> prefill(std::span<const int32_t> tokens, int32_t dtype, int num_queries,
                             const Take& take);
  // The same, all kept on the host. Shows progress.
  Prompt prefill(std::span<const int32_t> tokens, int32_t dtype, int num_queries);

  // Hands one layer of a prompt to a pipeline: each of its sequences begins with it. Selectors that
  // do not need all queries see the last `num_queries` of them.
  void fill(Pipeline& pipeline, int layer, const PromptRows& prompt,
            int num_queries = kPromptQueries);
  void fill(Pipeline& pipeline, int layer, const PromptLayer& prompt,
            int num_queries = kPromptQueries);
  void fill(Pipeline& pipeline, const Prompt& prompt);

  // w_o of a layer as selectors take it, fp32 [Hq * D, hidden]; empty on a GPU, whose selectors need
  // none.
  std::vector<float> output_projection(int layer) const {
    return backend_->output_projection(layer);
  }

  // One token per sequence of the pipeline, at its position, through all layers: `logits`
  // [B, vocab] are those of the next tokens. On a GPU the whole model's step is one CUDA graph, and
  // kEager launches it kernel by kernel.
  void step(Pipeline& pipeline, std::span<const int32_t> tokens, std::span<const int64_t> positions,
            float* logits, Pipeline::StepMode mode = Pipeline::StepMode::kRecorded);
  // The most likely next tokens [B] instead: on a GPU the logits stay there.
  void step_greedy(Pipeline& pipeline, std::span<const int32_t> tokens,
                   std::span<const int64_t> positions, int32_t* next);

  // The same without attention and cache: the time that no pipeline can go below.
  void step_without_cache(std::span<const int32_t> tokens, std::span<const int64_t> positions,
                          int32_t* next);

  // logits [n, vocab] from hidden states [n, hidden] behind the last layer.
  void logits(const float* hidden, int64_t n, float* logits);

 private:
  int64_t q_width() const { return int64_t{config().num_query_heads} * config().head_dim; }
  int64_t kv_width() const { return int64_t{config().num_kv_heads} * config().head_dim; }
  void check_token(int32_t token) const;
  void check_step(std::span<const int32_t> tokens, std::span<const int64_t> positions) const;

  std::unique_ptr<ModelFile> model_;  // stays where it is: the backend refers to it
  Device& device_;
  std::unique_ptr<ModelBackend> backend_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_TRANSFORMER_H_
