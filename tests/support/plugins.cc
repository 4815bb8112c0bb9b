#include "tests/support/plugins.h"

#include <algorithm>
#include <map>
#include <memory>

#include "framework/base/error.h"
#include "framework/device/cuda_device.h"
#include "plugins/sdk/options.h"

namespace sikv::testing {
namespace {

std::vector<std::string> values_of(const sikv_option_spec& spec) {
  std::vector<std::string> values(1);
  for (const char* c = spec.choices; *c != '\0'; ++c) {
    if (*c == '|') {
      values.emplace_back();
    } else {
      values.back() += *c;
    }
  }
  return values;
}

constexpr std::string_view kBasePrefix = "base.";

// The choices that are meant for the base.
Choices base_choices(const Choices& choices) {
  Choices inner;
  for (const auto& [name, text] : choices) {
    if (name.starts_with(kBasePrefix)) inner.emplace_back(name.substr(kBasePrefix.size()), text);
  }
  return inner;
}

bool is_wrapper(const Variant& variant) { return wrapper_option(variant.options) != nullptr; }

// The first selector that the wrapper takes as base; one that keeps all tokens if it may, and if it
// takes those that evict a quick one.
std::string default_base(const Variant& wrapper) {
  static std::map<std::string, std::string> found;
  std::string& id = found[wrapper.id];
  if (!id.empty()) return id;
  std::vector<std::string> ids = registry().ids(SIKV_SELECTOR);
  for (const char* preferred : {"snapkv", "quest"}) {
    const auto found = std::find(ids.begin(), ids.end(), preferred);
    if (found != ids.end()) std::rotate(ids.begin(), found, found + 1);
  }
  for (const std::string& candidate : ids) {
    if (is_wrapper(registry().choose(SIKV_SELECTOR, candidate, device_of(wrapper).info()))) {
      continue;
    }
    try {
      make_selector(wrapper, {{"base", candidate}}, make_shape(64, SIKV_FP16), device_of(wrapper));
      return id = candidate;
    } catch (const Error&) {  // it wants another base
    }
  }
  throw Error("no selector of this build can be the base of {}", wrapper.name());
}

}  // namespace

Choices own_choices(const Variant& variant, const Choices& choices) {
  if (!is_wrapper(variant)) return choices;
  Choices own = choices;
  std::erase_if(own, [](const auto& choice) { return choice.first.starts_with(kBasePrefix); });
  const bool named = std::any_of(own.begin(), own.end(),
                                 [](const auto& choice) { return choice.first == "base"; });
  if (!named) own.emplace_back("base", default_base(variant));
  return own;
}

std::unique_ptr<SelectorInstance> make_base(const Variant& variant, const Choices& choices,
                                            const sikv_shape& shape, Device& device) {
  if (!is_wrapper(variant)) return nullptr;
  std::string id;
  for (const auto& [name, text] : own_choices(variant, choices)) {
    if (name == "base") id = text;
  }
  return std::make_unique<SelectorInstance>(make_selector(
      registry().choose(SIKV_SELECTOR, id, device.info()), base_choices(choices), shape, device));
}

SelectorInstance make_selector(const Variant& variant, const Choices& choices,
                               const sikv_shape& shape, Device& device) {
  const OptionSet options =
      OptionSet::parse(variant.options, own_choices(variant, choices), variant.id);
  return {variant,       options,       shape,
          device.info(), device.host(), make_base(variant, choices, shape, device)};
}

const Registry& registry() {
  static const Registry* all = [] {
    auto* made = new Registry(served_devices);
    made->add_folder(SIKV_TEST_PLUGIN_FOLDER);
    return made;
  }();
  return *all;
}

Device& cpu(int threads) {
  static Device* serial = open_cpu_device(1).release();
  static Device* parallel = open_cpu_device(3).release();
  return threads == 1 ? *serial : *parallel;
}

Device& gpu() {
  static Device* const device = open_cuda_device().release();
  return *device;
}

const std::string& gpu_missing() {
  static const std::string missing = cuda_refusal();
  return missing;
}

Device& device_of(const Variant& variant, int threads) {
  return variant.device == SIKV_CUDA ? gpu() : cpu(threads);
}

sikv_shape make_shape(int head_dim, int32_t dtype, int num_kv_heads, int group) {
  return {.struct_size = sizeof(sikv_shape),
          .num_layers = 1,
          .num_query_heads = num_kv_heads * group,
          .num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .dtype = dtype,
          .max_sequences = 8,
          .max_tokens = 1 << 20,
          .rope_theta = 10000};
}

const Variant& find_variant(sikv_kind kind, std::string_view id, std::string_view variant) {
  return registry().choose(kind, id, cpu().info(), variant);
}

const Variant* find_gpu_variant(sikv_kind kind, std::string_view id) {
  if (!gpu_missing().empty()) return nullptr;
  for (const Candidate& candidate : registry().candidates(kind, id, gpu().info())) {
    if (candidate.score > 0) return candidate.variant;
  }
  return nullptr;
}

namespace {

// Empty unless the variant is a wrapper for which this build has no base.
std::string missing_base(const Variant& variant) {
  if (!is_wrapper(variant)) return "";
  try {
    default_base(variant);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

std::vector<Subject> subjects(sikv_kind kind) {
  std::vector<Subject> all;
  for (const std::string& id : registry().ids(kind)) {
    for (const Candidate& candidate : registry().candidates(kind, id, cpu().info())) {
      const Variant& variant = *candidate.variant;
      if (variant.device == SIKV_CPU && candidate.score > 0) {
        const std::string missing = missing_base(variant);
        all.push_back({kind, id, variant.variant, missing.empty() ? &variant : nullptr, missing,
                       !missing.empty()});
      }
    }
    if (!gpu_missing().empty()) continue;
    for (const Candidate& candidate : registry().candidates(kind, id, gpu().info())) {
      const Variant& variant = *candidate.variant;
      if (variant.device != SIKV_CUDA) continue;
      all.push_back(
          {kind, id, variant.variant, candidate.score > 0 ? &variant : nullptr, candidate.reason});
    }
  }
  for (const RefusedLibrary& library : registry().refused()) {
    const bool is_cuda = library.path.stem().string().ends_with("-cuda");
    if (is_cuda && (library.kinds & SIKV_KIND_BIT(kind)) != 0) {
      all.push_back({kind, library.id, "cuda", nullptr, library.reason});
    }
  }
  return all;
}

std::vector<Choices> all_choices(const Variant& variant) {
  std::vector<Choices> combinations(1);
  for (const sikv_option_spec& spec : variant.options) {
    if (spec.choices == nullptr) continue;
    std::vector<Choices> longer;
    for (const Choices& start : combinations) {
      for (const std::string& value : values_of(spec)) {
        longer.push_back(start);
        longer.back().emplace_back(spec.name, value);
      }
    }
    combinations = std::move(longer);
  }
  return combinations;
}

std::vector<Choices> single_choices(const Variant& variant) {
  std::vector<Choices> singles(1);
  for (const sikv_option_spec& spec : variant.options) {
    if (spec.choices == nullptr) continue;
    for (const std::string& value : values_of(spec)) {
      if (value != spec.default_value) singles.push_back({{spec.name, value}});
    }
  }
  return singles;
}

std::string describe(std::string_view id, const Choices& choices) {
  std::string text(id);
  const char* separator = "(";
  for (const auto& [name, value] : choices) {
    text += separator + name + "=" + value;
    separator = ",";
  }
  return choices.empty() ? text : text + ")";
}

}  // namespace sikv::testing
