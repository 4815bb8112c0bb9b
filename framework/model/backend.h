// The arithmetic of a transformer on one kind of device. What does not depend on the device (checks
// of tokens and lengths, the order of layers and chunks, how prompts reach pipelines) is in
// Transformer.
#ifndef SIKV_FRAMEWORK_MODEL_BACKEND_H_
#define SIKV_FRAMEWORK_MODEL_BACKEND_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "framework/device/device.h"
#include "framework/model/model_file.h"
#include "framework/pipeline/pipeline.h"

namespace sikv {

// What one layer of a prompt gives to caches, in their element type, on the host or the device.
struct PromptRows {
  const void *k, *v;  // [tokens, Hkv, D]
  const void* q;      // [queries, Hq, D], the last positions
  int64_t tokens;
  int queries;
};

class ModelBackend {
 public:
  virtual ~ModelBackend() = default;

  // Bytes of weights that one decode step reads, as they are kept.
  virtual uint64_t step_bytes() const = 0;
  // Tokens of a prompt that go through a layer together.
  virtual int64_t chunk_tokens() const = 0;
  // Device memory that a prefill of `tokens` takes beside caches; 0 where that is the host's.
  virtual uint64_t prefill_bytes(int64_t tokens, int32_t dtype) const = 0;

  // A prompt at positions from 0, whose caches take `dtype`; `queries` of its last ones are kept.
  // Then each layer gets its chunks in order, and prefilled() gives its rows, valid until the next
  // layer begins. Errors name the first layer that gives a NaN.
  virtual void begin_prefill(std::span<const int32_t> tokens, int32_t dtype, int queries) = 0;
  virtual void prefill_chunk(int layer, int64_t first, int64_t count) = 0;
  virtual PromptRows prefilled(int layer) = 0;
  // [hidden] of the last token behind the last layer.
  virtual std::vector<float> end_prefill() = 0;

  // One token per sequence through all layers and, with a pipeline, its caches. Gives the logits
  // [n, vocab] where `logits`, and the most likely next tokens [n] where `next`.
  virtual void step(Pipeline* pipeline, std::span<const int32_t> tokens,
                    std::span<const int64_t> positions, Pipeline::StepMode mode, float* logits,
                    int32_t* next) = 0;

  // Transformer::output_projection.
  virtual std::vector<float> output_projection(int layer) const = 0;

  // logits [n, vocab] from hidden states [n, hidden] behind the last layer; both on the host.
  virtual void logits(const float* hidden, int64_t n, float* logits) = 0;
};

// The model stays the caller's and outlives the backend.
std::unique_ptr<ModelBackend> make_cpu_backend(const ModelFile& model, Device& device);
// Takes the matrices to the GPU and leaves `model` without their data. Matrices without data from
// the start are drawn there (ModelFile::random_seed).
std::unique_ptr<ModelBackend> make_cuda_backend(ModelFile& model, Device& device);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_BACKEND_H_
