// How fast and how large a pipeline is at deployment size: the cache of all layers is really
// allocated and filled with synthetic tokens, then decode steps are timed.
//
// All sequences of a batch are filled from the same K and V, so that the input takes the room of
// one sequence and one layer; every sequence still has pages of its own, and a step moves the bytes
// that it would move for different texts. On a GPU the layers share it too, steps are replayed
// whole, and a model's weights are allocated and read once per step beside them.
#ifndef SIKV_FRAMEWORK_EXPERIMENT_THROUGHPUT_H_
#define SIKV_FRAMEWORK_EXPERIMENT_THROUGHPUT_H_

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "framework/cache/ledger.h"
#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/experiment/measure.h"
#include "framework/metrics/summary.h"
#include "framework/pipeline/pipeline.h"
#include "framework/registry/registry.h"

namespace sikv {

struct Throughput {
  std::string pipeline;           // printed form
  std::optional<int64_t> budget;  // tokens, at the first timed step
  int64_t context = 0;
  int batch = 0;
  std::vector<ChosenVariant> variants;
  Ledger ledger;
  uint64_t memory_growth = 0;  // of the process while the cache was made and used
  double bytes_per_token = 0;
  double compression = 0;
  double compression_total = 0;
  // Seconds, as in Measured.
  std::map<std::string, double> prefill_s;
  std::map<std::string, Summary> step_s;
  // GPU, model with weight_bytes: the step and the weights read after it.
  std::optional<Summary> whole_step_s;
};

class ThroughputBench {
 public:
  // `config` has a model and a synthetic source, else Error. `memory_limit` bounds the cache; 0 =
  // what is free.
  ThroughputBench(const Config& config, const Registry& registry, Device& device,
                  uint64_t memory_limit);

  uint64_t weight_bytes() const { return weights_.bytes(); }
  // Steps timed, and steps replayed before them: measure.steps, else source.steps, else 16.
  int64_t steps() const { return steps_; }
  int64_t warmup() const { return config_.measure.warmup; }

  // Bytes the cache will take: as planned, and the selector's state, measured on one layer and
  // sequence.
  uint64_t cache_bytes(const PipelineSpec& spec, int64_t context, int batch);
  // The largest batch of at most `most` sequences that fits; 0 if none does.
  int largest_batch(const PipelineSpec& spec, int64_t context, int most);
  // Error that names the largest batch, or else the longest context, that fits.
  void check_fits(const PipelineSpec& spec, int64_t context, int batch);

  // Throws Interrupted after Ctrl-C.
  Throughput measure(const PipelineSpec& spec, int64_t context, int batch);

 private:
  sikv_shape shape(int64_t context, int batch) const;
  // Whether a cache of that many bytes and its input go into what is free or allowed.
  bool has_room(uint64_t cache, int64_t context, int batch) const;
  bool fits(const PipelineSpec& spec, int64_t context, int batch);
  // As planned, without the selector's state.
  uint64_t plan_bytes(const PipelineSpec& spec, int64_t context, int batch);
  // What the selector keeps for a cache of `shape`: measured for one layer and sequence of that
  // length, or of the next longer one that was measured.
  double state_bytes(const PipelineSpec& spec, const sikv_shape& shape);
  Throughput run(const PipelineSpec& spec, const sikv_shape& shape, int64_t warmup, int64_t steps);

  class SharedInput;

  void run_steps(Pipeline& pipeline, SharedInput& input, const sikv_shape& shape, int64_t warmup,
                 int64_t steps);
  void replay_steps(Pipeline& pipeline, SharedInput& input, const sikv_shape& shape, int64_t warmup,
                    int64_t steps, Throughput& row);

  const Config& config_;
  const Registry& registry_;
  Device& device_;
  uint64_t memory_limit_;
  int64_t steps_;
  DeviceBuffer weights_;  // on a GPU, if the model says how many bytes
  // By pipeline, then by tokens: bytes of one layer and sequence.
  std::map<std::string, std::map<int64_t, double>> state_bytes_;
};

// What of the free memory a plan may use: tables of pages, buffers of plugins and other processes
// take the rest.
uint64_t usable_bytes(const Device& device);

// A cache of `batch` sequences of at most `tokens` tokens.
sikv_shape model_shape(const ModelSpec& model, int32_t dtype, int64_t tokens, int batch);

// The largest batch of at most `most` for which `spec` is planned to take no more than `bytes`,
// without the selector's state; 0 if none is. `shape.max_sequences` is not read.
int largest_planned_batch(const PipelineSpec& spec, const Registry& registry, Device& device,
                          sikv_shape shape, int max_new_tokens, uint64_t bytes, int most);

// longest_context_text for one of `context` tokens; fits(n) says whether a sequence of n does.
std::string longest_context_text(int64_t context, const std::function<bool(int64_t)>& fits);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_EXPERIMENT_THROUGHPUT_H_
