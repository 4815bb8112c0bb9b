// One pipeline on one source: replay prompt and steps, judge every (layer, KV head, step).
#ifndef SIKV_FRAMEWORK_EXPERIMENT_MEASURE_H_
#define SIKV_FRAMEWORK_EXPERIMENT_MEASURE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "framework/cache/ledger.h"
#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/experiment/source.h"
#include "framework/metrics/attention_metrics.h"
#include "framework/metrics/summary.h"
#include "framework/pipeline/bytes_read.h"
#include "framework/pipeline/pipeline.h"

namespace sikv {

// Exact attention of every (layer, row, measured step) of a source, computed when first asked for
// and kept while it fits in `cache_bytes`; shared by the pipelines of a comparison.
class ExactReference {
 public:
  ExactReference(const Source& source, Device& device, uint64_t cache_bytes = uint64_t{2} << 30);
  ~ExactReference();

  // fp32 copies of the exact rows of (layer, row): [T, D].
  const float* keys(int layer, int row) const;
  const float* values(int layer, int row) const;
  // All rows of a layer at one step (0 = first after the prompt).
  const std::vector<ExactAttention>& at(int layer, int64_t step);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct ChosenVariant {
  std::string role, id, variant;
};

struct Measured {
  std::string pipeline;           // printed form
  std::optional<int64_t> budget;  // tokens, at the first measured step
  std::vector<ChosenVariant> variants;
  // dropped_mass, recall, selection_error, output_error, kv_error: those asked for.
  std::map<std::string, Summary> metrics;
  double bytes_per_token = 0;  // pages in use, per encoded token and KV head, evicted ones too
  double compression = 0;      // of a stored token: 4 D / its bytes
  // Pages in use, side tables and the selector's state, per encoded token and KV head: what a long
  // context costs. Tail, pinned tokens and working memory are the same for all, or do not grow.
  double memory_per_token = 0;
  // Bytes read per step for one KV head of one layer, on average: by the selector to decide, where
  // it counts them, and of the tokens attended to (on a GPU where a metric looks at them).
  std::optional<double> scan_bytes, attended_bytes;
  // Tokens selected per step for one KV head, on average: of the judged layers, as recall is.
  std::optional<double> tokens_selected;
  double compression_total = 0;  // dense fp16 bytes of the whole cache / ledger total
  Ledger ledger;
  // Seconds: fit, encode, observe for the whole prompt of all layers; append, select, attend of all
  // layers, summarised over the steps.
  std::map<std::string, double> prefill_s;
  std::map<std::string, Summary> step_s;
  Counters counters;  // of the selector, over the measured steps
};

// `measure.metrics` says what to judge; `measure.warmup` steps are replayed first and not judged.
// Shows progress under the pipeline's name; throws Interrupted after Ctrl-C.
Measured measure_pipeline(const PipelineSpec& spec, const Registry& registry, Device& device,
                          const Source& source, ExactReference& exact, const MeasureSpec& measure);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_EXPERIMENT_MEASURE_H_
