// Everything a plugin author includes. Derive from Codec, Selector or Kernel, override what the
// method needs, list the options, register:
//
//   constexpr sikv_option_spec kOptions[] = {sikv::budget_option("budget", "256", "tokens")};
//   std::unique_ptr<sikv::Selector> make(const sikv::CreateArgs& args) { return ...; }
//   SIKV_PLUGIN("my_selector", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
//               sikv::selector<make, kOptions>("ref"))
//
// Exceptions become ABI codes: throw sikv::Refused for the caller's faults. plugins/template/ is
// the smallest complete example.
#ifndef SIKV_PLUGINS_SDK_PLUGIN_H_
#define SIKV_PLUGINS_SDK_PLUGIN_H_

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <iterator>
#include <memory>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "plugins/abi/sikv_codec.h"
#include "plugins/abi/sikv_kernel.h"
#include "plugins/abi/sikv_selector.h"
#include "plugins/sdk/base_selector.h"
#include "plugins/sdk/error.h"
#include "plugins/sdk/options.h"
#include "plugins/sdk/view.h"

namespace sikv {

// What an instance is made from. The references outlive the instance's constructor only, except
// for host, which outlives the instance.
struct CreateArgs {
  explicit CreateArgs(const sikv_create_args& args)
      : options(args),
        shape(*args.shape),
        device(*args.device),
        host(*args.host),
        base(args.base, args.base_self),
        layers(args.layers,
               args.layers == nullptr ? 0 : static_cast<size_t>(args.shape->num_layers)) {}

  Options options;
  sikv_shape shape;
  sikv_device device;
  const sikv_host& host;
  BaseSelector base;                // of a wrapper; it outlives the instance
  std::span<const int32_t> layers;  // of its model, that the cache holds; empty without a model

  int group() const { return shape.num_query_heads / shape.num_kv_heads; }
};

// body(i, worker) for i in [0, n) on the host's workers.
template <typename Body>
void parallel_for(const sikv_host& host, int64_t n, Body&& body) {
  struct Shared {
    Body& body;
    std::exception_ptr error;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
  } shared{body, nullptr};
  host.parallel_for(
      host.context, n,
      [](void* arg, int64_t i, int32_t worker) {
        auto& shared = *static_cast<Shared*>(arg);
        try {
          shared.body(i, worker);
        } catch (...) {
          if (!shared.failed.test_and_set()) shared.error = std::current_exception();
        }
      },
      &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

class Codec {
 public:
  virtual ~Codec() = default;
  virtual const sikv_layout& layout() const = 0;
  virtual uint64_t workspace_bytes() const { return 0; }
  virtual void fit(const RowsView& rows, const CacheView& view, Launch launch) = 0;
  virtual void encode(const RowsView& rows, const int32_t* first_slot, const CacheView& view,
                      Launch launch) = 0;
  virtual void decode(const sikv_decode_args& args, const CacheView& view, void* stream) const = 0;
};

class Selector {
 public:
  using Plan = SelectorPlan;

  virtual ~Selector() = default;
  // Throws Refused with the reason if the key layout cannot be read.
  virtual void accepts(const LayoutView& key_layout) { static_cast<void>(key_layout); }
  virtual Plan plan() = 0;
  virtual void begin_sequence(int sequence) { static_cast<void>(sequence); }
  virtual void observe(const sikv_observe_args& args, const CacheView& view, Launch launch) {
    static_cast<void>(args), static_cast<void>(view), static_cast<void>(launch);
  }
  virtual void observe_page(const sikv_observe_page_args& args, const CacheView& view,
                            Launch launch) {
    static_cast<void>(args), static_cast<void>(view), static_cast<void>(launch);
  }
  virtual void begin_step(int64_t step) { static_cast<void>(step); }
  virtual void run(const sikv_select_args& args, const CacheView& view, Launch launch) = 0;
  virtual uint64_t state_bytes() const { return 0; }
  // Appends counters through push(name, value).
  virtual void counters(const std::function<void(std::string_view, double)>& push) const {
    static_cast<void>(push);
  }
};

// A selector that also gives tokens back: registered with evicting_selector<>.
class EvictingSelector : public Selector {
 public:
  virtual void evict(const sikv_evict_args& args, const CacheView& view, Launch launch) = 0;
};

// One that also tells what its keep-lists are made from: registered with scoring_selector<>.
class ScoringSelector : public EvictingSelector {
 public:
  virtual void score(const sikv_score_args& args, const CacheView& view, Launch launch) = 0;
};

// A selector around another: passes on whatever a method does not override. Registered with
// scoring_selector<>, too; the framework asks for evictions and scores only if the base has them. One
// that passes run on is registered with SIKV_SELECTOR_SELECTS_ALL, which then is the base's answer.
class WrappingSelector : public ScoringSelector {
 public:
  explicit WrappingSelector(const CreateArgs& args) : base_(args.base) {}

  void accepts(const LayoutView& key_layout) override { base_.accepts(key_layout); }
  Plan plan() override { return base_.plan(); }
  void begin_sequence(int sequence) override { base_.begin_sequence(sequence); }
  void observe(const sikv_observe_args& args, const CacheView&, Launch launch) override {
    base_.observe(args, launch);
  }
  void observe_page(const sikv_observe_page_args& args, const CacheView&, Launch launch) override {
    base_.observe_page(args, launch);
  }
  void begin_step(int64_t step) override { base_.begin_step(step); }
  void run(const sikv_select_args& args, const CacheView&, Launch launch) override {
    base_.run(args, launch);
  }
  void evict(const sikv_evict_args& args, const CacheView&, Launch launch) override {
    base_.evict(args, launch);
  }
  void score(const sikv_score_args& args, const CacheView&, Launch launch) override {
    base_.score(args, launch);
  }
  uint64_t state_bytes() const override { return base_.state_bytes(); }
  // Those of the base with this selector's own. Equal names are added up, but for `runs`, which
  // both count.
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    Counts own = own_counters();
    base_.counters([&](std::string_view name, double value) {
      const auto found = std::find_if(own.begin(), own.end(),
                                      [&](const auto& count) { return count.first == name; });
      if (found != own.end()) {
        value = name == "runs" ? std::max(value, found->second) : value + found->second;
        own.erase(found);
      }
      push(name, value);
    });
    for (const auto& [name, value] : own) push(name, value);
  }

 protected:
  using Counts = std::vector<std::pair<std::string_view, double>>;
  virtual Counts own_counters() const { return {}; }

  BaseSelector base_;
};

class Kernel {
 public:
  virtual ~Kernel() = default;
  // Throws Refused with the reason if the layouts cannot be read.
  virtual void accepts(const LayoutView& key_layout, const LayoutView& value_layout) {
    static_cast<void>(key_layout), static_cast<void>(value_layout);
  }
  // Workspace bytes for selections of at most `capacity` slots per row.
  virtual uint64_t plan(int32_t capacity) { return static_cast<void>(capacity), 0; }
  virtual void run(const sikv_attend_args& args, const CacheView& view, Launch launch) = 0;
};

// Default probe: runs anywhere, loses against any faster variant.
inline int32_t probe_ref(const sikv_device* device, sikv_message* reason) {
  static_cast<void>(device), static_cast<void>(reason);
  return 1;
}

namespace sdk {

template <typename Base, auto Factory>
int32_t create(const sikv_create_args* args, void** self, sikv_message* why) {
  return guarded(why, [&] {
    std::unique_ptr<Base> made = Factory(CreateArgs(*args));
    *self = made.release();
  });
}

template <typename Base>
void destroy(void* self) {
  delete static_cast<Base*>(self);
}

template <auto Factory, auto Probe>
struct CodecTable {
  static Codec& of(void* self) { return *static_cast<Codec*>(self); }
  static constexpr sikv_codec_table value = {
      sizeof(sikv_codec_table),
      0,
      Probe,
      create<Codec, Factory>,
      destroy<Codec>,
      [](void* self, sikv_layout* layout, sikv_message* why) {
        return guarded(why, [&] { *layout = of(self).layout(); });
      },
      [](void* self, uint64_t* bytes, sikv_message* why) {
        return guarded(why, [&] { *bytes = of(self).workspace_bytes(); });
      },
      [](void* self, const sikv_rows* rows, const sikv_cache_view* view, void* workspace,
         void* stream, sikv_message* why) {
        return guarded(why, [&] {
          of(self).fit(RowsView(*rows), CacheView(*view), {workspace, stream});
        });
      },
      [](void* self, const sikv_rows* rows, const int32_t* first_slot, const sikv_cache_view* view,
         void* workspace, void* stream, sikv_message* why) {
        return guarded(why, [&] {
          of(self).encode(RowsView(*rows), first_slot, CacheView(*view), {workspace, stream});
        });
      },
      [](void* self, const sikv_decode_args* args, void* stream, sikv_message* why) {
        return guarded(why, [&] { of(self).decode(*args, CacheView(*args->view), stream); });
      },
  };
};

template <typename Base, auto Factory, auto Probe, uint32_t Flags>
struct SelectorTable {
  static Base& of(void* self) { return *static_cast<Base*>(self); }
  static constexpr auto evict_slot() -> decltype(sikv_selector_table::evict) {
    if constexpr (std::is_base_of_v<EvictingSelector, Base>) {
      return [](void* self, const sikv_evict_args* args, void* workspace, void* stream,
                sikv_message* why) {
        return guarded(why, [&] {
          of(self).evict(*args, CacheView(*args->view), {workspace, stream});
        });
      };
    } else {
      return nullptr;
    }
  }
  static constexpr auto score_slot() -> decltype(sikv_selector_table::score) {
    if constexpr (std::is_base_of_v<ScoringSelector, Base>) {
      return [](void* self, const sikv_score_args* args, void* workspace, void* stream,
                sikv_message* why) {
        return guarded(why, [&] {
          of(self).score(*args, CacheView(*args->view), {workspace, stream});
        });
      };
    } else {
      return nullptr;
    }
  }
  static constexpr sikv_selector_table value = {
      sizeof(sikv_selector_table),
      Flags,
      Probe,
      create<Base, Factory>,
      destroy<Base>,
      [](void* self, const sikv_layout* key_layout, sikv_message* why) {
        return guarded(why, [&] { of(self).accepts(LayoutView(*key_layout)); });
      },
      [](void* self, int32_t* capacity, uint64_t* workspace_bytes, sikv_message* why) {
        return guarded(why, [&] {
          const Selector::Plan plan = of(self).plan();
          *capacity = plan.capacity;
          *workspace_bytes = plan.workspace_bytes;
        });
      },
      [](void* self, int32_t sequence, sikv_message* why) {
        return guarded(why, [&] { of(self).begin_sequence(sequence); });
      },
      [](void* self, const sikv_observe_args* args, void* workspace, void* stream,
         sikv_message* why) {
        return guarded(why, [&] {
          of(self).observe(*args, CacheView(*args->view), {workspace, stream});
        });
      },
      [](void* self, const sikv_observe_page_args* args, void* workspace, void* stream,
         sikv_message* why) {
        return guarded(why, [&] {
          of(self).observe_page(*args, CacheView(*args->view), {workspace, stream});
        });
      },
      [](void* self, int64_t step, sikv_message* why) {
        return guarded(why, [&] { of(self).begin_step(step); });
      },
      [](void* self, const sikv_select_args* args, void* workspace, void* stream,
         sikv_message* why) {
        return guarded(why, [&] {
          of(self).run(*args, CacheView(*args->view), {workspace, stream});
        });
      },
      [](void* self) {
        uint64_t bytes = 0;
        guarded(nullptr, [&] { bytes = of(self).state_bytes(); });
        return bytes;
      },
      evict_slot(),
      [](void* self, sikv_counter* counters, uint32_t capacity) {
        uint32_t n = 0;
        guarded(nullptr, [&] {
          of(self).counters([&](std::string_view name, double value) {
            if (n < capacity) {
              const size_t size = std::min(name.size(), sizeof counters[n].name - 1);
              name.copy(counters[n].name, size);
              counters[n].name[size] = '\0';
              counters[n].value = value;
            }
            ++n;
          });
        });
        return n;
      },
      score_slot(),
  };
};

template <auto Factory, auto Probe, uint32_t Flags>
struct KernelTable {
  static Kernel& of(void* self) { return *static_cast<Kernel*>(self); }
  static constexpr sikv_kernel_table value = {
      sizeof(sikv_kernel_table),
      Flags,
      Probe,
      create<Kernel, Factory>,
      destroy<Kernel>,
      [](void* self, const sikv_layout* key_layout, const sikv_layout* value_layout,
         sikv_message* why) {
        return guarded(
            why, [&] { of(self).accepts(LayoutView(*key_layout), LayoutView(*value_layout)); });
      },
      [](void* self, int32_t capacity, uint64_t* workspace_bytes, sikv_message* why) {
        return guarded(why, [&] { *workspace_bytes = of(self).plan(capacity); });
      },
      [](void* self, const sikv_attend_args* args, void* workspace, void* stream,
         sikv_message* why) {
        return guarded(why, [&] {
          of(self).run(*args, CacheView(*args->view), {workspace, stream});
        });
      },
      nullptr,
  };
};

template <const auto& Options>
constexpr sikv_plugin_entry entry(sikv_kind kind, const char* variant, const void* table) {
  return {static_cast<uint32_t>(kind), 0, variant, std::data(Options), std::size(Options), table};
}

}  // namespace sdk

template <auto Factory, const auto& Options, auto Probe = probe_ref>
sikv_plugin_entry key_codec(const char* variant) {
  return sdk::entry<Options>(SIKV_KEY_CODEC, variant, &sdk::CodecTable<Factory, Probe>::value);
}
template <auto Factory, const auto& Options, auto Probe = probe_ref>
sikv_plugin_entry value_codec(const char* variant) {
  return sdk::entry<Options>(SIKV_VALUE_CODEC, variant, &sdk::CodecTable<Factory, Probe>::value);
}
template <auto Factory, const auto& Options, auto Probe = probe_ref, uint32_t Flags = 0>
sikv_plugin_entry selector(const char* variant) {
  return sdk::entry<Options>(SIKV_SELECTOR, variant,
                             &sdk::SelectorTable<Selector, Factory, Probe, Flags>::value);
}
template <auto Factory, const auto& Options, auto Probe = probe_ref, uint32_t Flags = 0>
sikv_plugin_entry evicting_selector(const char* variant) {
  return sdk::entry<Options>(SIKV_SELECTOR, variant,
                             &sdk::SelectorTable<EvictingSelector, Factory, Probe, Flags>::value);
}
template <auto Factory, const auto& Options, auto Probe = probe_ref, uint32_t Flags = 0>
sikv_plugin_entry scoring_selector(const char* variant) {
  return sdk::entry<Options>(SIKV_SELECTOR, variant,
                             &sdk::SelectorTable<ScoringSelector, Factory, Probe, Flags>::value);
}
template <auto Factory, const auto& Options, auto Probe = probe_ref, uint32_t Flags = 0>
sikv_plugin_entry kernel(const char* variant) {
  return sdk::entry<Options>(SIKV_KERNEL, variant, &sdk::KernelTable<Factory, Probe, Flags>::value);
}

// For plugins that take no options.
inline constexpr std::span<const sikv_option_spec> kNoOptions{};

namespace sdk {

template <size_t N>
constexpr void copy_name(char (&to)[N], std::string_view from) {
  for (size_t i = 0; i < from.size() && i + 1 < N; ++i) to[i] = from[i];
}

constexpr sikv_plugin_descriptor_t descriptor(std::string_view id, std::string_view version,
                                              sikv_device_type device, uint32_t kinds,
                                              std::string_view architectures,
                                              std::string_view faster_paths) {
  sikv_plugin_descriptor_t descriptor{};
  for (int i = 0; i < 8; ++i) descriptor.magic[i] = SIKV_PLUGIN_MAGIC[i];
  descriptor.struct_size = sizeof descriptor;
  descriptor.abi_major = SIKV_ABI_MAJOR;
  descriptor.abi_minor = SIKV_ABI_MINOR;
  descriptor.kinds = kinds;
  descriptor.device = device;
  copy_name(descriptor.id, id);
  copy_name(descriptor.version, version);
  copy_name(descriptor.architectures, architectures);
  copy_name(descriptor.faster_paths, faster_paths);
#ifdef SIKV_BUILD_ID
  copy_name(descriptor.build_id, SIKV_BUILD_ID);
#endif
  return descriptor;
}

}  // namespace sdk
}  // namespace sikv

#ifndef SIKV_PLUGIN_ARCHITECTURES
#define SIKV_PLUGIN_ARCHITECTURES ""
#endif
#ifndef SIKV_PLUGIN_FASTER_PATHS
#define SIKV_PLUGIN_FASTER_PATHS ""
#endif

#define SIKV_EXPORT __attribute__((visibility("default")))

// Exports the library's two symbols. `kinds` is SIKV_KIND_BIT of each kind, or-ed; the rest are
// entries made by key_codec<>, value_codec<>, selector<>, evicting_selector<>, scoring_selector<> or
// kernel<>.
#define SIKV_PLUGIN(id, version, device, kinds, ...)                                         \
  extern "C" {                                                                               \
  SIKV_EXPORT extern const sikv_plugin_descriptor_t sikv_plugin_descriptor;                  \
  constexpr sikv_plugin_descriptor_t sikv_plugin_descriptor = ::sikv::sdk::descriptor(       \
      id, version, device, kinds, SIKV_PLUGIN_ARCHITECTURES, SIKV_PLUGIN_FASTER_PATHS);      \
  SIKV_EXPORT const sikv_plugin_tables_t* sikv_plugin_tables() {                             \
    static const sikv_plugin_entry entries[] = {__VA_ARGS__};                                \
    static const sikv_plugin_tables_t tables = {sizeof tables, std::size(entries), entries}; \
    return &tables;                                                                          \
  }                                                                                          \
  }

#endif  // SIKV_PLUGINS_SDK_PLUGIN_H_
