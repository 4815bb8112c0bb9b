// The selector that a wrapper wraps, as C++: every call throws what the base answered.
#ifndef SIKV_PLUGINS_SDK_BASE_SELECTOR_H_
#define SIKV_PLUGINS_SDK_BASE_SELECTOR_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "plugins/abi/sikv_selector.h"
#include "plugins/sdk/error.h"
#include "plugins/sdk/view.h"

namespace sikv {

// Where a call runs: device workspace as planned, and the stream (null on the CPU).
struct Launch {
  void* workspace = nullptr;
  void* stream = nullptr;
};

// What a selector answers before the first run.
struct SelectorPlan {
  int32_t capacity = 0;          // largest selection per row
  uint64_t workspace_bytes = 0;  // device, for run
};

// Not owned: the framework destroys the base after the wrapper.
class BaseSelector {
 public:
  BaseSelector() = default;
  BaseSelector(const sikv_selector_table* table, void* self) : table_(table), self_(self) {}

  // False for a selector that wraps nothing.
  explicit operator bool() const { return table_ != nullptr; }

  uint32_t flags() const { return table_->flags; }
  bool selects_all() const { return (flags() & SIKV_SELECTOR_SELECTS_ALL) != 0; }
  bool evicts() const { return table_->evict != nullptr; }
  bool scores() const { return table_->score != nullptr; }

  // Throws Refused with the base's reason.
  void accepts(const LayoutView& key_layout) const {
    checked([&](sikv_message* why) { return table_->accepts(self_, &key_layout.raw(), why); });
  }
  SelectorPlan plan() const {
    SelectorPlan plan;
    checked([&](sikv_message* why) {
      return table_->plan(self_, &plan.capacity, &plan.workspace_bytes, why);
    });
    return plan;
  }
  void begin_sequence(int sequence) const {
    checked([&](sikv_message* why) { return table_->begin_sequence(self_, sequence, why); });
  }
  void observe(const sikv_observe_args& args, Launch launch) const {
    checked([&](sikv_message* why) {
      return table_->observe(self_, &args, launch.workspace, launch.stream, why);
    });
  }
  void observe_page(const sikv_observe_page_args& args, Launch launch) const {
    checked([&](sikv_message* why) {
      return table_->observe_page(self_, &args, launch.workspace, launch.stream, why);
    });
  }
  void begin_step(int64_t step) const {
    checked([&](sikv_message* why) { return table_->begin_step(self_, step, why); });
  }
  void run(const sikv_select_args& args, Launch launch) const {
    checked([&](sikv_message* why) {
      return table_->run(self_, &args, launch.workspace, launch.stream, why);
    });
  }
  // Only if evicts().
  void evict(const sikv_evict_args& args, Launch launch) const {
    checked([&](sikv_message* why) {
      return table_->evict(self_, &args, launch.workspace, launch.stream, why);
    });
  }
  // Only if scores().
  void score(const sikv_score_args& args, Launch launch) const {
    checked([&](sikv_message* why) {
      return table_->score(self_, &args, launch.workspace, launch.stream, why);
    });
  }
  uint64_t state_bytes() const { return table_->state_bytes(self_); }
  void counters(const std::function<void(std::string_view, double)>& push) const {
    if (table_->counters == nullptr) return;
    std::vector<sikv_counter> all(table_->counters(self_, nullptr, 0));
    const uint32_t room = static_cast<uint32_t>(all.size());
    all.resize(std::min(table_->counters(self_, all.data(), room), room));
    for (const sikv_counter& counter : all) push(counter.name, counter.value);
  }

 private:
  template <typename Call>
  void checked(Call&& call) const {
    if (table_ == nullptr) throw PluginBug("the plugin calls a base that it does not have");
    sdk::checked(call);
  }

  const sikv_selector_table* table_ = nullptr;
  void* self_ = nullptr;
};

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_BASE_SELECTOR_H_
