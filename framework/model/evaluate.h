// What a pipeline does to what a model says: teacher-forced steps behind a prompt, each compared
// with dense attention.
#ifndef SIKV_FRAMEWORK_MODEL_EVALUATE_H_
#define SIKV_FRAMEWORK_MODEL_EVALUATE_H_

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
#include "framework/registry/registry.h"

namespace sikv {

struct EvalText {
  std::string name;             // "developers-reference.txt, tokens 2000 .. 6191"
  std::vector<int32_t> tokens;  // prompt + steps + 1
  int64_t prompt = 0;
  int64_t steps = 0;
};

struct Evaluated {
  std::string pipeline;           // printed form
  std::optional<int64_t> budget;  // tokens, at the first step
  std::vector<ChosenVariant> variants;
  double nll = 0;        // nats per token, mean over steps
  double nll_added = 0;  // to dense
  // sum p_dense (log p_dense - log p_pipeline) over the vocabulary, nats, over steps.
  std::optional<Summary> kl;  // none for dense itself
  double top1_same = 0;       // share of steps with dense attention's most likely token
  // Scans per (layer, KV head) and step; nothing for selectors that do not count them.
  std::optional<double> scans_per_step;
  double bytes_per_token = 0;    // encoded pages, per token and KV head
  double compression_total = 0;  // dense fp16 bytes of the whole cache / ledger total
  Ledger ledger;
  double prefill_s = 0;                   // fit, encode, observe of the whole prompt, all layers
  Summary token_s;                        // the whole model, per step
  std::map<std::string, Summary> step_s;  // append, select, attend, all layers
  Counters counters;                      // of the selector
  // Bytes read per step for one KV head of one layer, on average: by the selector to decide, where
  // it counts them, and of the tokens attended to, which a GPU does not tell.
  std::optional<double> scan_bytes, attended_bytes;
};

// One text. Its dense prefill and the dense steps are made once, by the constructor, and serve
// every pipeline.
class Evaluation {
 public:
  // `dtype` of K, V and Q as the caches get them: fp16 or fp32. `num_queries` of the last prompt
  // queries go to the selectors; with `all_queries` those that need all get all. Shows progress;
  // throws Interrupted after Ctrl-C.
  Evaluation(Transformer& model, EvalText text, int32_t dtype, int num_queries, bool all_queries,
             const Registry& registry, Device& device);

  const EvalText& text() const { return text_; }
  double prefill_seconds() const { return prefill_s_; }

  // Dense attention, through the same steps as every pipeline.
  static std::string dense_pipeline(const Registry& registry);
  const Evaluated& dense() const { return dense_; }
  Evaluated run(const PipelineSpec& spec, Device& device);

 private:
  // Runs the steps; judge(step, logits) after each.
  template <typename Judge>
  Evaluated replay(const PipelineSpec& spec, Device& device, Judge&& judge);

  Transformer& model_;
  EvalText text_;
  const Registry& registry_;
  int32_t dtype_;
  int num_queries_;
  Prompt prompt_;
  double prefill_s_ = 0;
  std::vector<float> log_p_;  // [steps, vocab] of dense attention
  Evaluated dense_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_EVALUATE_H_
