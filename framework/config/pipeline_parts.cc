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

std::string force_key(const PipelineSpec& spec, const PipelinePart& part) {
  return fmt::format("{}.{}", part.family, (spec.*part.plugin).id);
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

void check_part(PipelineSpec& spec, const PipelinePart& part, const Registry& registry) {
  PluginSpec& plugin = spec.*part.plugin;
  const std::span<const sikv_option_spec> list = registry.options(part.kind, plugin.id);
  const std::string owner = fmt::format("{} '{}'", kind_name(part.kind), plugin.id);
  if (part.kind == SIKV_SELECTOR) {
    // Known to the reader as well as the plugin's own, so that suggestions cover both.
    std::vector<sikv_option_spec> all(list.begin(), list.end());
    all.insert(all.end(), kCommonOptions.begin(), kCommonOptions.end());
    for (const auto& [name, text] : plugin.options) {
      static_cast<void>(find_option(all, name, owner));
    }
  }
  static_cast<void>(OptionSet::parse(list, plugin.options, owner));
  const auto place = [&](const auto& option) { return &find_option(list, option.first, owner); };
  std::sort(plugin.options.begin(), plugin.options.end(),
            [&](const auto& a, const auto& b) { return place(a) < place(b); });
}

void force_variant(PipelineSpec& spec, const PipelinePart& part, const std::string& variant,
                   const Registry& registry) {
  static_cast<void>(registry.find(part.kind, (spec.*part.plugin).id, variant));
  spec.force[force_key(spec, part)] = variant;
}

const std::string* forced_variant(const PipelineSpec& spec, const PipelinePart& part) {
  const auto found = spec.force.find(force_key(spec, part));
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
  const std::string near = did_you_mean(device, names);
  throw Error("device is '{}'{}", device, near.empty() ? ", expected " + join(names) : near);
}

}  // namespace sikv
