// A pipeline at work: key codec + value codec > selector > attention kernel over one KV cache.
//
//   prefill   per layer: fit, encode full pages, rest to the tail, pin, selector.observe
//   step      begin_step, then per layer: append k,v ; attend q -> out, lse
//
// All variants and layouts are settled in the constructor; nothing is converted or replaced later.
#ifndef SIKV_FRAMEWORK_PIPELINE_PIPELINE_H_
#define SIKV_FRAMEWORK_PIPELINE_PIPELINE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "framework/cache/kv_cache.h"
#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/pipeline/offer.h"
#include "framework/pipeline/staging.h"
#include "framework/registry/instance.h"
#include "framework/registry/registry.h"

namespace sikv {

inline constexpr const char* kBaseRole = "base";

// One plugin of a pipeline as it was chosen.
struct ChosenPart {
  std::string role;  // keys, values, selector, base (what a selector wraps), attention
  const Variant* variant;
  std::vector<Candidate> candidates;  // all variants with their probe answers, best first
  bool forced;
};

// The four plugins of a spec with their options, without memory: what `sikv explain` needs and
// what a Pipeline is made from. Checks that the parts understand each other's layouts.
class Composition {
 public:
  // `layers`: the number in its model of each layer of the cache; empty where it has no model.
  Composition(const PipelineSpec& spec, const Registry& registry, Device& device,
              const sikv_shape& shape, std::span<const int> layers = {});

  const PipelineSpec& spec() const { return spec_; }
  const std::vector<ChosenPart>& parts() const { return parts_; }
  const sikv_layout& key_layout() const { return key_layout_; }
  const sikv_layout& value_layout() const { return value_layout_; }
  // The selector's budget for a sequence of `length` tokens, a wrapper's being that of what it
  // wraps; nothing if there is no such option.
  std::optional<int64_t> budget(int64_t length) const;

  // Bytes the cache of `shape` takes when every sequence has `tokens` tokens, planned without
  // allocating: all that the ledger of a pipeline shows but what the selector keeps.
  Ledger planned(int64_t tokens, const CacheOptions& options) const;
  // Of an evicting selector: encoded tokens of each KV head that it keeps of a prompt, pinned ones
  // counted. Heads or layers that share a budget get this many on average.
  int64_t kept_of(int64_t prompt) const;
  CacheOptions cache_options(int max_new_tokens) const;

  CodecInstance& keys() const { return *keys_; }
  CodecInstance& values() const { return *values_; }
  SelectorInstance& selector() const { return *selector_; }
  KernelInstance& kernel() const { return *kernel_; }
  int32_t capacity() const { return capacity_; }
  uint64_t log_weights_bytes() const;  // of a step of one layer; 0 if the selector does not weigh
  uint64_t selector_workspace() const { return selector_workspace_; }
  uint64_t kernel_workspace() const { return kernel_workspace_; }

 private:
  // The variant that runs, noted in parts_, and its options.
  std::pair<const Variant*, OptionSet> choose(const char* role, sikv_kind kind,
                                              const PluginSpec& plugin, const Registry& registry,
                                              Device& device);
  std::unique_ptr<SelectorInstance> make_selector(const PluginSpec& plugin,
                                                  const Registry& registry, Device& device);
  template <typename T>
  std::unique_ptr<T> make(const char* role, sikv_kind kind, const PluginSpec& plugin,
                          const Registry& registry, Device& device);

  PipelineSpec spec_;
  sikv_shape shape_;
  std::vector<int> layers_;
  std::vector<ChosenPart> parts_;
  std::optional<sikv_option_value> budget_;
  std::unique_ptr<CodecInstance> keys_, values_;
  std::unique_ptr<SelectorInstance> selector_;
  std::unique_ptr<KernelInstance> kernel_;
  sikv_layout key_layout_{}, value_layout_{};
  int32_t capacity_ = 0;
  uint64_t selector_workspace_ = 0, kernel_workspace_ = 0;
};

// Seconds by stage: one total for the prefill stages, one sample per step for the others.
struct StageTimes {
  double fit = 0, encode = 0, observe = 0;
  std::map<std::string, std::vector<double>> steps;  // append, select, attend
};

// Tokens that steps attended to, summed over rows, layers and steps: encoded ones, and exact ones,
// which are pinned or in the tail.
struct AttendedTokens {
  double encoded = 0, exact = 0, rows = 0;

  void add(double encoded_tokens, double exact_tokens) {
    encoded += encoded_tokens;
    exact += exact_tokens;
    rows += 1;
  }
};

// w_o [Hq * D, hidden] of one layer, fp32; none where it is null.
struct OutputProjection {
  const float* w_o = nullptr;
  int hidden = 0;
};

// For errors about a context of which not one sequence fits: what would, the longest of whole pages
// having `tokens` tokens.
std::string longest_context_text(int64_t tokens);

class Pipeline {
 public:
  // `max_new_tokens`: tokens appended per sequence after its prompt, at most.
  Pipeline(const PipelineSpec& spec, const Registry& registry, Device& device,
           const sikv_shape& shape, int max_new_tokens, std::span<const int> layers = {});

  // Data of K, V and q may lie on the device or on the host, from where it is copied; device data
  // of decode steps is aligned to 16 bytes. `first` and `count` of rows lie on the host.

  // The prompts of one layer, from layer 0 on. queries [B, W, Hq, D]: each sequence's last W prompt
  // positions; where the selector needs all, W is the longest prompt and shorter ones are padded in
  // front. Error if it needs what is not given.
  void prefill(int layer, const sikv_rows& keys, const sikv_rows& values, const void* queries,
               int num_queries, const OutputProjection& projection = {});

  void begin_step();
  // One token per sequence: k, v [B, H, D].
  void append(int layer, const void* k, const void* v);
  // q [B, Hq, D] -> out [B, Hq, D], lse [B, Hq], both fp32.
  void attend(int layer, const void* q, float* out, float* lse);

  // A whole step: begin_step, then append and attend of every layer, which all give device memory.
  // On a GPU it is recorded once and replayed while the addresses stay the same and the lengths
  // within a bound: nothing is allocated and nothing waits, and `synchronize` tells when it is
  // done. (Steps in which an evicting selector gets a page are launched one by one, and wait.)
  struct LayerStep {
    const void *k, *v, *q;
    float *out, *lse;

    bool operator==(const LayerStep&) const = default;
  };
  enum class StepMode { kRecorded, kEager };
  // What a model enqueues around each layer's cache, recorded with it: before(l) makes k, v and q,
  // after(l) takes out. The same for the same addresses.
  struct Around {
    std::function<void(int layer)> before, after;
  };
  void step(std::span<const LayerStep> layers, StepMode mode = StepMode::kRecorded,
            const Around& around = {});
  // Waits for all work. Error naming layer, head and position if a kernel met a number that no
  // cache takes.
  void synchronize();

  // Slots the last `attend` chose for a row of `layer`; counts of SIKV_SELECT_ALL are resolved.
  std::vector<int32_t> selected(int row) const;
  // All encoded tokens of a row as the codec gives them back, fp32 [encoded_len, D].
  std::vector<float> decoded(int layer, int row, const CodecInstance& codec) const;

  const Device& device() const { return device_; }
  const Composition& composition() const { return composition_; }
  const KvCache& cache() const { return cache_; }
  const StageTimes& times() const { return times_; }
  // From here on steps count the tokens they attend to on a GPU, too: a launch of 2 us a layer.
  void count_attended();
  // Of all steps since the last reset; on a GPU only where they were counted.
  AttendedTokens attended() const;
  void reset_steps() {
    times_.steps.clear();
    attended_ = {};
    if (attended_sums_.bytes() > 0) count_attended();
  }
  std::vector<sikv_counter> counters() const { return composition_.selector().counters(); }
  // The cache's ledger plus selection, workspace and selector state.
  Ledger ledger() const;

 private:
  struct Recorded {
    std::unique_ptr<Device::Recording> steps;
    std::vector<LayerStep> layers;
    std::vector<int> bounds;
  };

  void choose_pins(int layer, const sikv_rows& keys, const void* queries, int num_queries);
  void enqueue_select(int layer, const void* q);
  void enqueue_attend(int layer, const void* q, float* out, float* lse);
  void flush_full_tails(int layer);
  bool flush_due(int layer) const;
  // Error if K and V are not one prompt for an empty layer, or the selector needs more than it
  // brings.
  void check_prompt(int layer, const sikv_rows& keys, const sikv_rows& values, int num_queries,
                    const OutputProjection& projection) const;
  // After observe or observe_page of `layer`: asks for the evictions that are now due.
  void evict_after(int layer);
  void apply_evictions(int layer);
  // Error if one more token is more than was planned for. A full tail that is about to be flushed
  // has room.
  void check_room(int layer) const;
  void replay(std::span<const LayerStep> layers, const Around& around);
  // InternalError naming the selector if slots are out of range, out of order or repeated.
  void check_slots(const char* what, const sikv_cache_view& view, int row, const int32_t* slots,
                   int32_t count, int32_t capacity, bool ordered) const;
  void check_storable(const char* what, int layer, const void* data, int heads) const;
  size_t token_bytes(int heads) const;

  Composition composition_;
  Device& device_;
  sikv_shape shape_;
  float scale_;
  KvCache cache_;
  DeviceBuffer workspace_, slots_, counts_, log_weights_, keep_slots_, keep_counts_;
  Staging prompt_, token_;
  DeviceBuffer out_, lse_;  // of attend, where the caller's lie on the host
  sikv_selection selection_{};
  Recorded recorded_[2];  // without and with a flush
  StageTimes times_;
  AttendedTokens attended_;
  DeviceBuffer attended_sums_;  // encoded, exact, rows; empty unless counted on a GPU
  int64_t step_ = -1;
  int selected_layer_ = 0;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_PIPELINE_PIPELINE_H_
