// Live instances of plugins: the tables of the ABI as C++ objects that throw Error.
#ifndef SIKV_FRAMEWORK_REGISTRY_INSTANCE_H_
#define SIKV_FRAMEWORK_REGISTRY_INSTANCE_H_

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "framework/registry/options.h"
#include "framework/registry/registry.h"

namespace sikv {

class SelectorInstance;

// Owns one instance made by a variant's create. Movable; destroys it at the end.
class Instance {
 public:
  // `layers` of a model, in the order of the cache's; empty where there is no model.
  Instance(const Variant& variant, const OptionSet& options, const sikv_shape& shape,
           const sikv_device& device, const sikv_host& host, std::span<const int> layers = {});
  Instance(Instance&& other) noexcept;
  Instance& operator=(Instance&& other) noexcept;
  ~Instance();

  const Variant& variant() const { return *variant_; }
  void* self() const { return self_; }
  // "file:line:column" of the config, in front of what is refused from now on; empty: nothing.
  void place(std::string where) { where_ = std::move(where); }
  // `text` with the place in front.
  std::string placed(const std::string& text) const;

 protected:
  Instance(const Variant& variant, const OptionSet& options, const sikv_shape& shape,
           const sikv_device& device, const sikv_host& host, std::span<const int> layers,
           std::unique_ptr<SelectorInstance> base);
  // What a wrapper wraps, or nullptr.
  const SelectorInstance* wrapped() const { return base_.get(); }

  // Calls an ABI function; SIKV_REFUSED becomes Error, SIKV_INTERNAL InternalError, both with the
  // plugin's name in front.
  template <typename Call>
  void checked(Call&& call) const {
    sikv_message why{};
    const int32_t status = call(&why);
    if (status != SIKV_OK) fail(status, why);
  }
  // For questions that may be answered with no: empty, or the reason.
  std::string refusal_of(int32_t status, const sikv_message& why) const;

 private:
  [[noreturn]] void fail(int32_t status, const sikv_message& why) const;

  const Variant* variant_ = nullptr;
  void* self_ = nullptr;
  std::string where_;
  std::unique_ptr<SelectorInstance> base_;  // outlives self_
};

class CodecInstance : public Instance {
 public:
  using Instance::Instance;
  sikv_layout describe() const;
  uint64_t workspace_bytes() const;
  void fit(const sikv_rows& rows, const sikv_cache_view& view, void* workspace, void* stream);
  void encode(const sikv_rows& rows, const int32_t* first_slot, const sikv_cache_view& view,
              void* workspace, void* stream);
  void decode(const sikv_decode_args& args, void* stream) const;
};

class SelectorInstance : public Instance {
 public:
  // `base` is what a wrapper wraps. Error if it evicts and the wrapper cannot pass that on.
  SelectorInstance(const Variant& variant, const OptionSet& options, const sikv_shape& shape,
                   const sikv_device& device, const sikv_host& host,
                   std::unique_ptr<SelectorInstance> base = nullptr,
                   std::span<const int> layers = {});
  struct Plan {
    int32_t capacity;
    uint64_t workspace_bytes;
  };
  // The variant's table as this instance can serve it: a wrapper has the needs of its base, and
  // neither evict nor score where the base lacks them.
  const sikv_selector_table& table() const { return *table_; }
  const SelectorInstance* base() const { return wrapped(); }
  // Empty if the layout can be read, else the reason.
  std::string refusal(const sikv_layout& key_layout) const;
  Plan plan();
  void begin_sequence(int sequence);
  void observe(const sikv_observe_args& args, void* workspace, void* stream);
  void observe_page(const sikv_observe_page_args& args, void* workspace, void* stream);
  void begin_step(int64_t step);
  void run(const sikv_select_args& args, void* workspace, void* stream);
  bool evicts() const;
  void evict(const sikv_evict_args& args, void* workspace, void* stream);
  bool scores() const;
  bool weighs() const;
  void score(const sikv_score_args& args, void* workspace, void* stream);
  uint64_t state_bytes() const;
  std::vector<sikv_counter> counters() const;

 private:
  std::unique_ptr<sikv_selector_table> table_;  // its address is the base's in wrappers
};

class KernelInstance : public Instance {
 public:
  using Instance::Instance;
  std::string refusal(const sikv_layout& key_layout, const sikv_layout& value_layout) const;
  bool attends_all() const;
  bool weighs() const;
  uint64_t plan(int32_t capacity);
  void run(const sikv_attend_args& args, void* workspace, void* stream);
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REGISTRY_INSTANCE_H_
