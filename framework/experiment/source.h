// What a pipeline is fed: prompts and decode steps of every layer, from a trace or synthesised.
#ifndef SIKV_FRAMEWORK_EXPERIMENT_SOURCE_H_
#define SIKV_FRAMEWORK_EXPERIMENT_SOURCE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "framework/config/config.h"
#include "framework/pipeline/offer.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {

// One layer of B sequences of T tokens each, exact.
struct SourceLayer {
  int model_layer = 0;       // its number in the model
  std::vector<std::byte> k;  // [B, T, H, D]
  std::vector<std::byte> v;  // [B, T, H, D]
  std::vector<std::byte> q;  // [B, Nq, Hq, D] positions first_query .. first_query + Nq - 1
  std::vector<float> w_o;    // [Hq * D, hidden]; empty where the source has none
};

struct Source {
  std::string text;  // "datasets/smollm2-135m-4k.h5, 6 layers, prompt 4064, 31 steps"
  int num_sequences = 1, num_query_heads = 0, num_kv_heads = 0, head_dim = 0;
  int32_t dtype = SIKV_FP16;
  double rope_theta = 0;
  int64_t num_tokens = 0;   // T
  int64_t num_queries = 0;  // Nq
  int64_t first_query = 0;
  int64_t prompt = 0, steps = 0;
  std::vector<SourceLayer> layers;
  Offer offer;              // what selectors may need of it
  std::vector<int> judged;  // indices of the layers whose metrics count

  // Queries per sequence that lie in the prompt.
  int64_t prompt_queries() const { return prompt > first_query ? prompt - first_query : 0; }
  // The shape a pipeline for this source is made with.
  sikv_shape shape() const;
  std::vector<int> layer_numbers() const;  // in the model
};

// Reads the trace, or synthesises the first (context, batch) of the config. Errors name what the
// trace lacks: steps without a query, a prompt longer than the trace ...
Source load_source(const Config& config);

// Of the config's source, from the trace's header alone.
Offer source_offer(const Config& config);

// An input type by its name in configs: fp16, bf16 or fp32. Error otherwise.
int32_t parse_dtype(const std::string& name);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_EXPERIMENT_SOURCE_H_
