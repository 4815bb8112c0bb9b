// Greedy decoding with a pipeline as the model's KV cache.
#ifndef SIKV_FRAMEWORK_MODEL_GENERATE_H_
#define SIKV_FRAMEWORK_MODEL_GENERATE_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "framework/cache/ledger.h"
#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/model/transformer.h"
#include "framework/registry/registry.h"

namespace sikv {

struct GenerateOptions {
  int max_tokens = 64;
  int32_t stop_token = -1;  // ends the text and is not part of it; -1: none
  int32_t dtype = SIKV_FP16;
  bool all_queries = false;  // of the prompt are kept, for selectors that need them
};

struct Generated {
  std::string pipeline;         // printed form
  std::vector<int32_t> tokens;  // without the stop token
  double first_s = 0;           // from the start of the prefill to the first token
  double second_s = 0;          // to the second: filling the pipeline is in it; 0 without a second
  double token_s = 0;           // median of the steps after that; 0 without any
  // Scans per (layer, KV head) and step; nothing for selectors that do not count them.
  std::optional<double> scans_per_step;
  double bytes_per_token = 0;  // encoded pages, per token and KV head
  Ledger ledger;
  uint64_t dense_bytes = 0;  // fp16 K and V of as many tokens
};

// The prefill of one prompt, which serves any number of pipelines.
class Generator {
 public:
  // Error if prompt and options.max_tokens exceed the model's context. Shows progress.
  Generator(Transformer& model, std::vector<int32_t> prompt, const GenerateOptions& options);

  // Calls on_token after each; throws Interrupted after Ctrl-C.
  Generated run(const PipelineSpec& spec, const Registry& registry, Device& device,
                const std::function<void(int32_t)>& on_token);

 private:
  Transformer& model_;
  GenerateOptions options_;
  int64_t prompt_tokens_;
  Prompt prompt_;
  int32_t first_token_ = 0;
  double first_s_ = 0;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_GENERATE_H_
