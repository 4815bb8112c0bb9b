// How fast a whole model writes with a pipeline as its KV cache: the prompt is really prefilled,
// the cache filled, and decode steps of all sequences timed.
//
// Every sequence of a batch begins with the same random prompt; every sequence still has pages of
// its own. On a CPU it is prefilled once per context and serves all pipelines; on a GPU, where that
// is faster than to keep it, once per pipeline, straight into its cache, after a short one that is
// not timed. Steps are greedy: the logits stay where they are.
#ifndef SIKV_FRAMEWORK_MODEL_MODEL_THROUGHPUT_H_
#define SIKV_FRAMEWORK_MODEL_MODEL_THROUGHPUT_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "framework/cache/ledger.h"
#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/experiment/measure.h"
#include "framework/metrics/summary.h"
#include "framework/model/transformer.h"
#include "framework/pipeline/pipeline.h"
#include "framework/registry/registry.h"

namespace sikv {

struct ModelThroughputOptions {
  int64_t steps = 16, warmup = 2;
  int32_t dtype = SIKV_FP16;
  uint64_t memory_limit = 0;  // bounds the cache; 0 = what is free
  uint64_t seed = 1;
};

struct ModelThroughput {
  std::string pipeline;           // printed form
  std::optional<int64_t> budget;  // tokens, at the first timed step
  int64_t context = 0;
  int batch = 0;
  std::vector<ChosenVariant> variants;
  Ledger ledger;
  double bytes_per_token = 0;
  double first_s = 0;   // prefill of one sequence, to its first token
  double second_s = 0;  // to its second: filling the cache (one sequence's share of it) is in it
  Summary token_s;      // a step of the whole model, all sequences
  std::map<std::string, Summary> step_s;  // append, select, attend, all layers; not in one graph
  double tokens_per_s = 0;                // batch / mean step
};

class ModelThroughputBench {
 public:
  ModelThroughputBench(Transformer& model, const Registry& registry, Device& device,
                       const ModelThroughputOptions& options);

  // The largest batch of at most `most` sequences that fits; 0 if none does.
  int largest_batch(const PipelineSpec& spec, int64_t context, int most);
  // Error, with what does fit, if a batch does not or the context is beyond the model's.
  void check_fits(const PipelineSpec& spec, int64_t context, int batch);

  // Shows progress; throws Interrupted after Ctrl-C.
  ModelThroughput measure(const PipelineSpec& spec, int64_t context, int batch);
  // Seconds of a step that reads the weights and no cache: the limit of every pipeline.
  Summary weights_only(int batch);

 private:
  sikv_shape shape(int64_t context, int batch) const;
  uint64_t room(int64_t context) const;
  // Every sequence of the pipeline with the prompt. Seconds of one sequence's share of filling;
  // those of the prefill become prompt_s_.
  double fill(Pipeline& pipeline, int64_t context, int batch);
  // A short prompt of one sequence and its steps. CUDA loads a kernel where it is first launched:
  // without them the first pipeline's 32K tokens of an 8B model took 2.27 s, those of later ones
  // 2.02.
  void warm_up(const PipelineSpec& spec, int64_t context);
  // Calls step(tokens, positions, next) warmup + steps times; the seconds of each.
  template <typename Step>
  std::vector<double> timed_steps(int64_t context, int batch, Step&& step);

  Transformer& model_;
  const Registry& registry_;
  Device& device_;
  ModelThroughputOptions options_;
  Prompt prompt_;  // of the context measured last
  int64_t prompt_tokens_ = 0;
  double prompt_s_ = 0;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_MODEL_THROUGHPUT_H_
