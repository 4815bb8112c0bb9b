#include "framework/config/pipeline_parts.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/registry/options.h"

namespace sikv {
namespace {

constexpr std::array<const char*, 3> kPinNames = {"last_query", "snapkv", "first"};

constexpr std::array<sikv_option_spec, 3> kCommonOptions = {{
    {"pinned", SIKV_OPTION_INT, 0, 0, 65536, nullptr, "64",
     "tokens kept in the input type and always attended to"},
    {"pin", SIKV_OPTION_CHOICE, 0, 0, 0, "last_query|snapkv|first", "last_query",
     "which tokens are pinned after the prompt"},
    {"keep_generated", SIKV_OPTION_BOOL, 0, 0, 1, nullptr, "false",
     "keep all generated tokens in the tail, exact"},
}};
constexpr std::string_view kCommonOwner = "selector";

std::string force_key(const PipelinePart& part, const std::string& id) {
  return fmt::format("{}.{}", part.family, id);
}

std::string owner_of(sikv_kind kind, const PluginSpec& plugin) {
  return fmt::format("{} '{}'", kind_name(kind), plugin.id);
}

bool takes(std::span<const sikv_option_spec> options, std::string_view name) {
  return std::any_of(options.begin(), options.end(),
                     [&](const sikv_option_spec& option) { return option.name == name; });
}

std::vector<std::string> bases_of(const PluginSpec& plugin) {
  std::vector<std::string> ids;
  for (const PluginSpec* each : chain_of(plugin)) ids.push_back(each->id);
  ids.erase(ids.begin());
  return ids;
}

// `outermost` takes the common options of selectors, too.
void check_plugin(PluginSpec& plugin, sikv_kind kind, bool outermost, const Registry& registry) {
  const std::span<const sikv_option_spec> list = registry.options(kind, plugin.id);
  const std::string owner = owner_of(kind, plugin);
  // Known to the reader as well as the plugin's own, so that suggestions cover both.
  std::vector<sikv_option_spec> all(list.begin(), list.end());
  if (kind == SIKV_SELECTOR && outermost) {
    all.insert(all.end(), kCommonOptions.begin(), kCommonOptions.end());
  }
  for (const auto& [name, text] : plugin.options) {
    if (kind == SIKV_SELECTOR && !outermost) refuse_common_option_of_base(name);
    static_cast<void>(find_own_option(all, name, owner, bases_of(plugin), registry));
  }
  if (!plugin.base.empty()) check_plugin(plugin.base.front(), SIKV_SELECTOR, false, registry);
  static_cast<void>(OptionSet::parse(list, given_options(plugin, registry, kind), owner));
  const auto place = [&](const auto& option) { return &find_option(list, option.first, owner); };
  std::sort(plugin.options.begin(), plugin.options.end(),
            [&](const auto& a, const auto& b) { return place(a) < place(b); });
}

}  // namespace

std::span<const sikv_option_spec> selector_common_options() { return kCommonOptions; }

bool is_selector_common_option(std::string_view name) {
  return std::any_of(kCommonOptions.begin(), kCommonOptions.end(),
                     [&](const sikv_option_spec& spec) { return name == spec.name; });
}

void set_selector_common_option(PipelineSpec& spec, std::string_view name,
                                const std::string& text) {
  const sikv_option_value value =
      parse_option(find_option(kCommonOptions, name, kCommonOwner), text, kCommonOwner);
  if (name == "pinned") {
    spec.pinned = static_cast<int>(value.i);
  } else if (name == "pin") {
    const auto found = std::find(kPinNames.begin(), kPinNames.end(), text);
    spec.pin = static_cast<PinRule>(found - kPinNames.begin());
  } else {
    spec.keep_generated = value.i != 0;
  }
}

std::string selector_common_option(const PipelineSpec& spec, std::string_view name) {
  if (name == "pinned") return std::to_string(spec.pinned);
  if (name == "pin") return kPinNames.at(static_cast<size_t>(spec.pin));
  return spec.keep_generated ? "true" : "false";
}

void refuse_common_option_of_base(std::string_view name) {
  if (!is_selector_common_option(name)) return;
  throw Error(
      "{} is an option of the whole pipeline, not of a base; move it to the outermost selector",
      name);
}

const sikv_option_spec& find_own_option(std::span<const sikv_option_spec> options,
                                        std::string_view name, std::string_view owner,
                                        std::span<const std::string> bases,
                                        const Registry& registry) {
  std::string path(name);
  const std::vector<std::string> known = registry.ids(SIKV_SELECTOR);
  for (const std::string& base : bases) {
    path.insert(0, "base.");
    if (takes(options, name) || std::find(known.begin(), known.end(), base) == known.end()) break;
    if (!takes(registry.options(SIKV_SELECTOR, base), name)) continue;
    throw Error("{} has no option '{}': it is one of '{}', which it wraps; write {}", owner, name,
                base, path);
  }
  return find_option(options, name, owner);
}

void check_part(PipelineSpec& spec, const PipelinePart& part, const Registry& registry) {
  PluginSpec& plugin = spec.*part.plugin;
  check_plugin(plugin, part.kind, true, registry);
  std::vector<std::string> ids;
  for (const PluginSpec* each : chain_of(plugin)) ids.push_back(each->id);
  for (size_t i = 0; i < ids.size(); ++i) {
    if (std::find(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(i), ids[i]) ==
        ids.begin() + static_cast<ptrdiff_t>(i)) {
      continue;
    }
    throw Error("selector '{}' is wrapped around itself ({}); name each selector once", ids[i],
                join(ids, " around "));
  }
}

std::vector<std::pair<std::string, std::string>> given_options(const PluginSpec& plugin,
                                                               const Registry& registry,
                                                               sikv_kind kind) {
  std::vector<std::pair<std::string, std::string>> given = plugin.options;
  const sikv_option_spec* base = wrapper_option(registry.options(kind, plugin.id));
  if (base != nullptr && !plugin.base.empty()) {
    given.emplace_back(base->name, plugin.base.front().id);
  }
  return given;
}

std::vector<const PluginSpec*> chain_of(const PluginSpec& plugin) {
  std::vector<const PluginSpec*> chain = {&plugin};
  while (!chain.back()->base.empty()) chain.push_back(&chain.back()->base.front());
  return chain;
}

const PluginSpec* budget_holder(const PluginSpec& selector, const Registry& registry) {
  for (const PluginSpec* each : chain_of(selector)) {
    if (takes(registry.options(SIKV_SELECTOR, each->id), "budget")) return each;
  }
  return nullptr;
}

PluginSpec* budget_holder(PluginSpec& selector, const Registry& registry) {
  return const_cast<PluginSpec*>(budget_holder(std::as_const(selector), registry));
}

void force_variant(PipelineSpec& spec, const PipelinePart& part, const std::string& id,
                   const std::string& variant, const Registry& registry) {
  static_cast<void>(registry.find(part.kind, id, variant));
  spec.force[force_key(part, id)] = variant;
}

const std::string* forced_variant(const PipelineSpec& spec, const PipelinePart& part,
                                  const std::string& id) {
  const auto found = spec.force.find(force_key(part, id));
  return found == spec.force.end() ? nullptr : &found->second;
}

int gpu_number(const std::string& device) {
  constexpr std::string_view kPrefix = "cuda:";
  if (device == "cuda") return 0;
  int number = -1;
  const char* const end = device.data() + device.size();
  if (device.starts_with(kPrefix) && device.size() > kPrefix.size() &&
      std::isdigit(static_cast<unsigned char>(device[kPrefix.size()])) != 0) {
    const auto [rest, failed] = std::from_chars(device.data() + kPrefix.size(), end, number);
    if (failed != std::errc() || rest != end) return -1;
  }
  return number;
}

void check_device_name(const std::string& device) {
  if (std::find(kDeviceNames.begin(), kDeviceNames.end(), device) != kDeviceNames.end()) return;
  if (gpu_number(device) >= 0) return;
  const std::vector<std::string> names(kDeviceNames.begin(), kDeviceNames.end());
  const std::string near = did_you_mean(device == "gpu" ? "cuda" : device, names);
  throw Error("device is '{}'{}", device, near.empty() ? ", expected " + join(names) : near);
}

}  // namespace sikv
