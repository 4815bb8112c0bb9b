#include "framework/registry/instance.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "framework/base/error.h"

namespace sikv {
namespace {

struct Lifetime {
  int32_t (*create)(const sikv_create_args* args, void** self, sikv_message* why);
  void (*destroy)(void* self);
};

Lifetime lifetime(const Variant& variant) {
  switch (variant.kind) {
    case SIKV_SELECTOR:
      return {variant.selector().create, variant.selector().destroy};
    case SIKV_KERNEL:
      return {variant.kernel().create, variant.kernel().destroy};
    default:
      return {variant.codec().create, variant.codec().destroy};
  }
}

std::string text_of(const sikv_message& message) {
  std::string text(message.text, strnlen(message.text, sizeof message.text));
  return text.empty() ? "it gives no reason" : text;
}

}  // namespace

Instance::Instance(const Variant& variant, const OptionSet& options, const sikv_shape& shape,
                   const sikv_device& device, const sikv_host& host, std::span<const int> layers)
    : Instance(variant, options, shape, device, host, layers, nullptr) {}

Instance::Instance(const Variant& variant, const OptionSet& options, const sikv_shape& shape,
                   const sikv_device& device, const sikv_host& host, std::span<const int> layers,
                   std::unique_ptr<SelectorInstance> base)
    : variant_(&variant), base_(std::move(base)) {
  SIKV_ASSERT(layers.empty() || std::ssize(layers) == shape.num_layers);
  const sikv_create_args args{sizeof args,
                              static_cast<uint32_t>(options.values().size()),
                              options.values().data(),
                              &shape,
                              &device,
                              &host,
                              base_ == nullptr ? nullptr : &base_->table(),
                              base_ == nullptr ? nullptr : base_->self(),
                              layers.empty() ? nullptr : layers.data()};
  checked([&](sikv_message* why) { return lifetime(variant).create(&args, &self_, why); });
}

Instance::Instance(Instance&& other) noexcept
    : variant_(other.variant_),
      self_(std::exchange(other.self_, nullptr)),
      where_(std::move(other.where_)),
      base_(std::move(other.base_)) {}

Instance& Instance::operator=(Instance&& other) noexcept {
  std::swap(variant_, other.variant_);
  std::swap(self_, other.self_);
  std::swap(where_, other.where_);
  std::swap(base_, other.base_);
  return *this;
}

Instance::~Instance() {
  if (self_ != nullptr) lifetime(*variant_).destroy(self_);
}

std::string Instance::placed(const std::string& text) const {
  return where_.empty() ? text : fmt::format("{}: {}", where_, text);
}

void Instance::fail(int32_t status, const sikv_message& why) const {
  if (status == SIKV_REFUSED) {
    throw Error("{}", placed(fmt::format("{}: {}", variant_->name(), text_of(why))));
  }
  const std::string what = status == SIKV_INTERNAL
                               ? text_of(why)
                               : fmt::format("status {}, which the ABI does not have", status);
  throw InternalError(fmt::format("internal error in {} {}: {}; please report this to its author",
                                  variant_->name(), variant_->version, what));
}

std::string Instance::refusal_of(int32_t status, const sikv_message& why) const {
  if (status == SIKV_OK) return "";
  if (status == SIKV_REFUSED) return text_of(why);
  fail(status, why);
}

namespace {

// Empty, or why no page can be laid out like this.
std::string layout_fault(const sikv_layout& layout) {
  if (layout.num_planes > SIKV_MAX_PLANES || layout.num_tables > SIKV_MAX_TABLES ||
      layout.num_params > SIKV_MAX_PARAMS) {
    return fmt::format("{} planes, {} tables and {} parameters; at most {}, {} and {} are allowed",
                       layout.num_planes, layout.num_tables, layout.num_params, SIKV_MAX_PLANES,
                       SIKV_MAX_TABLES, SIKV_MAX_PARAMS);
  }
  if (std::memchr(layout.family, 0, sizeof layout.family) == nullptr || layout.family[0] == 0) {
    return "its family is not a name";
  }
  for (uint32_t i = 0; i < layout.num_planes; ++i) {
    const sikv_plane& plane = layout.planes[i];
    if (plane.tile_tokens == 0 || SIKV_PAGE_TOKENS % plane.tile_tokens != 0 ||
        plane.bytes_per_tile == 0) {
      return fmt::format("plane {} has tiles of {} tokens and {} bytes; tiles must divide a page",
                         i, plane.tile_tokens, plane.bytes_per_tile);
    }
    if (plane.organisation != SIKV_IN_LINE) continue;
    if (plane.tile_tokens != 1 ||
        uint64_t{layout.line_offset[i]} + plane.bytes_per_tile > layout.line_bytes) {
      return fmt::format("plane {} takes bytes {} on, {} for {} tokens, of a line of {}", i,
                         layout.line_offset[i], plane.bytes_per_tile, plane.tile_tokens,
                         layout.line_bytes);
    }
    for (uint32_t j = 0; j < i; ++j) {
      const sikv_plane& other = layout.planes[j];
      if (other.organisation == SIKV_IN_LINE &&
          layout.line_offset[i] < layout.line_offset[j] + other.bytes_per_tile &&
          layout.line_offset[j] < layout.line_offset[i] + plane.bytes_per_tile) {
        return fmt::format("planes {} and {} share bytes of a line", j, i);
      }
    }
  }
  return "";
}

}  // namespace

sikv_layout CodecInstance::describe() const {
  sikv_layout layout{};
  layout.struct_size = sizeof layout;
  checked([&](sikv_message* why) { return variant().codec().describe(self(), &layout, why); });
  if (const std::string fault = layout_fault(layout); !fault.empty()) {
    throw InternalError(
        fmt::format("{} describes a layout that cannot be: {}", variant().name(), fault));
  }
  return layout;
}

uint64_t CodecInstance::workspace_bytes() const {
  uint64_t bytes = 0;
  checked(
      [&](sikv_message* why) { return variant().codec().workspace_bytes(self(), &bytes, why); });
  return bytes;
}

void CodecInstance::fit(const sikv_rows& rows, const sikv_cache_view& view, void* workspace,
                        void* stream) {
  checked([&](sikv_message* why) {
    return variant().codec().fit(self(), &rows, &view, workspace, stream, why);
  });
}

void CodecInstance::encode(const sikv_rows& rows, const int32_t* first_slot,
                           const sikv_cache_view& view, void* workspace, void* stream) {
  checked([&](sikv_message* why) {
    return variant().codec().encode(self(), &rows, first_slot, &view, workspace, stream, why);
  });
}

void CodecInstance::decode(const sikv_decode_args& args, void* stream) const {
  checked([&](sikv_message* why) { return variant().codec().decode(self(), &args, stream, why); });
}

namespace {

// What a wrapper takes over from its base.
constexpr uint32_t kInherited = SIKV_SELECTOR_UNORDERED | SIKV_SELECTOR_NEEDS_ALL_QUERIES |
                                SIKV_SELECTOR_NEEDS_ALL_LAYERS | SIKV_SELECTOR_NEEDS_W_O |
                                SIKV_SELECTOR_EVICTS_TOGETHER;

}  // namespace

SelectorInstance::SelectorInstance(const Variant& variant, const OptionSet& options,
                                   const sikv_shape& shape, const sikv_device& device,
                                   const sikv_host& host, std::unique_ptr<SelectorInstance> base,
                                   std::span<const int> layers)
    : Instance(variant, options, shape, device, host, layers, std::move(base)),
      table_(std::make_unique<sikv_selector_table>(variant.selector())) {
  table_->struct_size = sizeof(sikv_selector_table);
  if (wrapped() == nullptr) return;
  const sikv_selector_table& inner = wrapped()->table();
  if (inner.evict != nullptr && table_->evict == nullptr) {
    throw Error("{} cannot wrap {}, which evicts tokens: choose a base that keeps all of them",
                variant.name(), wrapped()->variant().name());
  }
  if (wrapped()->weighs()) {
    throw Error("{} cannot wrap {}, whose tokens carry weights: use the latter by itself",
                variant.name(), wrapped()->variant().name());
  }
  table_->flags |= inner.flags & kInherited;
  if ((inner.flags & SIKV_SELECTOR_SELECTS_ALL) == 0) table_->flags &= ~SIKV_SELECTOR_SELECTS_ALL;
  if (inner.evict == nullptr) table_->evict = nullptr;
  if (inner.score == nullptr) table_->score = nullptr;
}

std::string SelectorInstance::refusal(const sikv_layout& key_layout) const {
  sikv_message why{};
  return refusal_of(table().accepts(self(), &key_layout, &why), why);
}

SelectorInstance::Plan SelectorInstance::plan() {
  Plan plan{0, 0};
  checked([&](sikv_message* why) {
    return table().plan(self(), &plan.capacity, &plan.workspace_bytes, why);
  });
  if (plan.capacity < 0) {
    throw InternalError(
        fmt::format("{} plans selections of {} slots", variant().name(), plan.capacity));
  }
  return plan;
}

void SelectorInstance::begin_sequence(int sequence) {
  checked([&](sikv_message* why) { return table().begin_sequence(self(), sequence, why); });
}

void SelectorInstance::observe(const sikv_observe_args& args, void* workspace, void* stream) {
  checked(
      [&](sikv_message* why) { return table().observe(self(), &args, workspace, stream, why); });
}

void SelectorInstance::observe_page(const sikv_observe_page_args& args, void* workspace,
                                    void* stream) {
  checked([&](sikv_message* why) {
    return table().observe_page(self(), &args, workspace, stream, why);
  });
}

void SelectorInstance::begin_step(int64_t step) {
  checked([&](sikv_message* why) { return table().begin_step(self(), step, why); });
}

void SelectorInstance::run(const sikv_select_args& args, void* workspace, void* stream) {
  checked([&](sikv_message* why) { return table().run(self(), &args, workspace, stream, why); });
}

bool SelectorInstance::evicts() const { return table().evict != nullptr; }

void SelectorInstance::evict(const sikv_evict_args& args, void* workspace, void* stream) {
  SIKV_ASSERT(evicts());
  checked([&](sikv_message* why) { return table().evict(self(), &args, workspace, stream, why); });
}

bool SelectorInstance::scores() const { return table().score != nullptr; }

bool SelectorInstance::weighs() const { return (table().flags & SIKV_SELECTOR_WEIGHS) != 0; }

void SelectorInstance::score(const sikv_score_args& args, void* workspace, void* stream) {
  SIKV_ASSERT(scores());
  checked([&](sikv_message* why) { return table().score(self(), &args, workspace, stream, why); });
}

uint64_t SelectorInstance::state_bytes() const { return table().state_bytes(self()); }

std::vector<sikv_counter> SelectorInstance::counters() const {
  if (table().counters == nullptr) return {};
  std::vector<sikv_counter> counters(table().counters(self(), nullptr, 0));
  const auto capacity = static_cast<uint32_t>(counters.size());
  counters.resize(std::min(table().counters(self(), counters.data(), capacity), capacity));
  for (sikv_counter& counter : counters) counter.name[sizeof counter.name - 1] = '\0';
  return counters;
}

std::string KernelInstance::refusal(const sikv_layout& key_layout,
                                    const sikv_layout& value_layout) const {
  sikv_message why{};
  return refusal_of(variant().kernel().accepts(self(), &key_layout, &value_layout, &why), why);
}

bool KernelInstance::attends_all() const {
  return (variant().kernel().flags & SIKV_KERNEL_ATTENDS_ALL) != 0;
}

bool KernelInstance::weighs() const { return (variant().kernel().flags & SIKV_KERNEL_WEIGHS) != 0; }

uint64_t KernelInstance::plan(int32_t capacity) {
  uint64_t workspace_bytes = 0;
  checked([&](sikv_message* why) {
    return variant().kernel().plan(self(), capacity, &workspace_bytes, why);
  });
  return workspace_bytes;
}

void KernelInstance::run(const sikv_attend_args& args, void* workspace, void* stream) {
  checked([&](sikv_message* why) {
    return variant().kernel().run(self(), &args, workspace, stream, why);
  });
}

}  // namespace sikv
