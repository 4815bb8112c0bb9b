#include <algorithm>
#include <tuple>

#include "framework/base/error.h"
#include "framework/config/pipeline_parts.h"
#include "framework/pipeline/pipeline.h"

namespace sikv {
namespace {

// A part is forced by its role, or by "<role>.<id>"; a base by the latter alone, its role being
// selector.
std::string forced_variant(const PipelineSpec& spec, const std::string& role,
                           const std::string& id) {
  const bool is_base = role == kBaseRole;
  for (const std::string& key : {(is_base ? "selector" : role) + "." + id, role}) {
    const auto found = spec.force.find(key);
    if (found != spec.force.end()) return found->second;
  }
  return {};
}

// The place in the config, where there is one, goes in front.
template <typename... Args>
[[noreturn]] void fail(const PluginSpec& plugin, fmt::format_string<Args...> format,
                       Args&&... args) {
  const std::string text = fmt::format(format, std::forward<Args>(args)...);
  if (plugin.where.empty()) throw Error("{}", text);
  throw Error("{}: {}", plugin.where, text);
}

// Runs `make`; its Error gets the place of `plugin` in front.
template <typename Make>
auto placed(const PluginSpec& plugin, Make&& make) {
  try {
    return make();
  } catch (const Error& error) {
    fail(plugin, "{}", error.what());
  }
}

// Whether it gives back single tokens, which ranking them tells, or what it wraps does; others keep
// whole pages where they must.
bool evicts_single_tokens(const SelectorInstance& selector) {
  if (!selector.evicts()) return false;
  const SelectorInstance* ranking = &selector;
  while (ranking != nullptr && !ranking->scores()) ranking = ranking->base();
  return ranking != nullptr;
}

// The plane whose bytes serve several tokens, or nullptr.
const sikv_plane* shared_plane(const sikv_layout& layout) {
  const sikv_plane* const end = layout.planes + layout.num_planes;
  const sikv_plane* const found = std::find_if(layout.planes, end, [](const sikv_plane& plane) {
    return plane.organisation == SIKV_SHARED;
  });
  return found == end ? nullptr : found;
}

}  // namespace

std::pair<const Variant*, OptionSet> Composition::choose(const char* role, sikv_kind kind,
                                                         const PluginSpec& plugin,
                                                         const Registry& registry, Device& device) {
  const std::string forced = forced_variant(spec_, role, plugin.id);
  const Variant& variant = registry.choose(kind, plugin.id, device.info(), forced);
  parts_.push_back(
      {role, &variant, registry.candidates(kind, plugin.id, device.info()), !forced.empty()});
  return {&variant, OptionSet::parse(variant.options, given_options(plugin, registry, kind),
                                     std::string(kind_name(kind)) + " " + plugin.id)};
}

template <typename T>
std::unique_ptr<T> Composition::make(const char* role, sikv_kind kind, const PluginSpec& plugin,
                                     const Registry& registry, Device& device) {
  auto made = placed(plugin, [&] {
    const auto chosen = choose(role, kind, plugin, registry, device);
    return std::make_unique<T>(*chosen.first, chosen.second, shape_, device.info(), device.host(),
                               layers_);
  });
  made->place(plugin.where);
  return made;
}

std::unique_ptr<SelectorInstance> Composition::make_selector(const PluginSpec& plugin,
                                                             const Registry& registry,
                                                             Device& device) {
  const char* const role = &plugin == &spec_.selector ? "selector" : kBaseRole;
  const auto chosen =
      placed(plugin, [&] { return choose(role, SIKV_SELECTOR, plugin, registry, device); });
  if (&plugin == budget_holder(std::as_const(spec_.selector), registry)) {
    budget_ = *chosen.second.find("budget");
    budget_->name = budget_->text = nullptr;  // they point into `chosen`
  }
  std::unique_ptr<SelectorInstance> base;
  if (!plugin.base.empty()) base = make_selector(plugin.base.front(), registry, device);
  auto made = placed(plugin, [&] {
    return std::make_unique<SelectorInstance>(*chosen.first, chosen.second, shape_, device.info(),
                                              device.host(), std::move(base), layers_);
  });
  made->place(plugin.where);
  return made;
}

Composition::Composition(const PipelineSpec& spec, const Registry& registry, Device& device,
                         const sikv_shape& shape, std::span<const int> layers)
    : spec_(spec), shape_(shape), layers_(layers.begin(), layers.end()) {
  keys_ = make<CodecInstance>("keys", SIKV_KEY_CODEC, spec.keys, registry, device);
  values_ = make<CodecInstance>("values", SIKV_VALUE_CODEC, spec.values, registry, device);
  selector_ = make_selector(spec_.selector, registry, device);
  kernel_ = make<KernelInstance>("attention", SIKV_KERNEL, spec.kernel, registry, device);
  key_layout_ = keys_->describe();
  value_layout_ = values_->describe();

  if (const std::string reason = selector_->refusal(key_layout_); !reason.empty()) {
    fail(spec.selector, "selector {} cannot read what key codec {} writes: {}", spec.selector.id,
         spec.keys.id, reason);
  }
  if (const std::string reason = kernel_->refusal(key_layout_, value_layout_); !reason.empty()) {
    fail(spec.kernel, "attention kernel {} cannot read what codecs {} and {} write: {}",
         spec.kernel.id, spec.keys.id, spec.values.id, reason);
  }
  if (const std::string reason = line_conflict(key_layout_, value_layout_); !reason.empty()) {
    fail(
        spec.values,
        "value codec {} keeps bytes in the lines of the keys, but key codec {} writes {}, {}: give "
        "both codecs a layout with such lines, or neither",
        spec.values.id, spec.keys.id, layout_text(key_layout_), reason);
  }
  if (evicts_single_tokens(*selector_)) {
    for (const auto& [what, codec, layout] :
         {std::tuple("key", &spec.keys, &key_layout_), {"value", &spec.values, &value_layout_}}) {
      const sikv_plane* const plane = shared_plane(*layout);
      if (plane == nullptr) continue;
      fail(spec.selector,
           "selector {} gives single tokens back, but {} codec {} writes {}, where {} tokens share "
           "their scales: use a codec with scales per token, or a selector that keeps whole pages, "
           "as streaming does",
           spec.selector.id, what, codec->id, layout_text(*layout), plane->tile_tokens);
    }
  }
  const bool selects_all = selector_->table().flags & SIKV_SELECTOR_SELECTS_ALL;
  if (kernel_->attends_all() && !selects_all) {
    fail(spec.kernel,
         "attention kernel {} attends to every token, so selector {} would have no effect: use "
         "selector full, or kernel gather_attention or sparse_flash",
         spec.kernel.id, spec.selector.id);
  }
  if (selector_->weighs() && !kernel_->weighs()) {
    fail(spec.selector,
         "selector {} gives its tokens weights, which attention kernel {} ({}) does not apply: use "
         "gather_attention on the CPU",
         spec.selector.id, spec.kernel.id, kernel_->variant().variant);
  }
  const auto plan = selector_->plan();
  capacity_ = plan.capacity;
  selector_workspace_ = plan.workspace_bytes;
  kernel_workspace_ = kernel_->plan(capacity_);
}

uint64_t Composition::log_weights_bytes() const {
  if (!selector_->weighs()) return 0;
  return static_cast<uint64_t>(shape_.max_sequences) *
         static_cast<uint64_t>(shape_.num_query_heads) * static_cast<uint64_t>(capacity_) *
         sizeof(float);
}

std::optional<int64_t> Composition::budget(int64_t length) const {
  if (!budget_) return std::nullopt;
  return budget_->i >= 0 ? budget_->i
                         : static_cast<int64_t>(budget_->f * static_cast<double>(length));
}

int64_t Composition::kept_of(int64_t prompt) const {
  const int64_t encoded = prompt / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
  return std::min(encoded, budget(prompt).value_or(encoded) + spec_.pinned);
}

CacheOptions Composition::cache_options(int max_new_tokens) const {
  return {spec_.pinned,
          spec_.keep_generated ? SIKV_PAGE_TOKENS + max_new_tokens : int{SIKV_PAGE_TOKENS},
          selector_->evicts()};
}

Ledger Composition::planned(int64_t tokens, const CacheOptions& options) const {
  Ledger ledger;
  const uint64_t rows = static_cast<uint64_t>(shape_.num_layers) *
                        static_cast<uint64_t>(shape_.max_sequences) *
                        static_cast<uint64_t>(shape_.num_kv_heads);
  const uint64_t pages = static_cast<uint64_t>(tokens / SIKV_PAGE_TOKENS);
  const uint64_t row_bytes = static_cast<uint64_t>(shape_.head_dim) *
                             static_cast<uint64_t>(sikv_dtype_bytes(shape_.dtype));
  for (const sikv_layout* layout : {&key_layout_, &value_layout_}) {
    for (uint32_t i = 0; i < layout->num_planes; ++i) {
      ledger.add(role_name(layout->planes[i].role),
                 rows * pages * plane_page_bytes(layout->planes[i]));
    }
  }
  ledger.add(kLinePadding, rows * pages * line_padding_page_bytes(key_layout_, value_layout_));
  for (const sikv_layout* layout : {&key_layout_, &value_layout_}) {
    for (uint32_t i = 0; i < layout->num_tables; ++i) {
      ledger.add("side_tables", rows * layout->tables[i].count * sizeof(float));
    }
  }
  ledger.add("tail", 2 * rows * static_cast<uint64_t>(options.tail_capacity) * row_bytes);
  ledger.add("pinned", 2 * rows * static_cast<uint64_t>(options.pinned_capacity) * row_bytes);
  ledger.add("page_tables", KvCache::page_table_bytes(shape_, options));
  const uint64_t layer_rows = rows / static_cast<uint64_t>(shape_.num_layers);
  ledger.add("selection", layer_rows * (static_cast<uint64_t>(capacity_) + 1) * sizeof(int32_t));
  ledger.add("selection", log_weights_bytes());
  if (selector_->evicts()) {
    ledger.add("selection",
               layer_rows * (static_cast<uint64_t>(shape_.max_tokens) + 1) * sizeof(int32_t));
  }
  ledger.add("workspace", std::max({selector_workspace_, kernel_workspace_,
                                    keys_->workspace_bytes(), values_->workspace_bytes()}));
  return ledger;
}

}  // namespace sikv
