// The four plugins of a pipeline, as data: shared by the YAML reader, the one-line form and the
// JSON schema, so that they cannot disagree.
#ifndef SIKV_FRAMEWORK_CONFIG_PIPELINE_PARTS_H_
#define SIKV_FRAMEWORK_CONFIG_PIPELINE_PARTS_H_

#include <array>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "framework/config/config.h"
#include "framework/registry/registry.h"

namespace sikv {

struct PipelinePart {
  const char* family;  // key of a pipeline in YAML, and in PipelineSpec::force
  const char* id_key;  // key of the plugin's id within it
  const char* help;
  sikv_kind kind;
  PluginSpec PipelineSpec::*plugin;
};

inline constexpr std::array<PipelinePart, 4> kPipelineParts = {{
    {"keys", "codec", "how keys are stored", SIKV_KEY_CODEC, &PipelineSpec::keys},
    {"values", "codec", "how values are stored", SIKV_VALUE_CODEC, &PipelineSpec::values},
    {"selector", "name", "which tokens a query attends to", SIKV_SELECTOR, &PipelineSpec::selector},
    {"attention", "kernel", "how it attends to them", SIKV_KERNEL, &PipelineSpec::kernel},
}};

inline constexpr std::array<const char*, 3> kDeviceNames = {"auto", "cpu", "cuda"};

// What every selector takes beside its own options, because the framework serves it: pinned, pin
// and keep_generated of PipelineSpec.
std::span<const sikv_option_spec> selector_common_options();
bool is_selector_common_option(std::string_view name);
// Sets one of them from its text; Error if the text is not allowed.
void set_selector_common_option(PipelineSpec& spec, std::string_view name, const std::string& text);
// Its text in `spec`.
std::string selector_common_option(const PipelineSpec& spec, std::string_view name);

// An option by name; where one of the selectors `bases` has it, which the plugin wraps from outside
// in, the Error says how to write that.
const sikv_option_spec& find_own_option(std::span<const sikv_option_spec> options,
                                        std::string_view name, std::string_view owner,
                                        std::span<const std::string> bases,
                                        const Registry& registry);

// Checks id and options of one part, and of all it wraps, against the registry and puts the options
// in the order of the plugin's list.
void check_part(PipelineSpec& spec, const PipelinePart& part, const Registry& registry);
// Error if `name` is an option that only the outermost selector takes.
void refuse_common_option_of_base(std::string_view name);

// The options of a plugin as OptionSet takes them: of a wrapper, with the id of its base.
std::vector<std::pair<std::string, std::string>> given_options(const PluginSpec& plugin,
                                                               const Registry& registry,
                                                               sikv_kind kind);

// A plugin and what it wraps, from outside in.
std::vector<const PluginSpec*> chain_of(const PluginSpec& plugin);
// The first selector of the chain that has an option `budget`, or nullptr.
const PluginSpec* budget_holder(const PluginSpec& selector, const Registry& registry);
PluginSpec* budget_holder(PluginSpec& selector, const Registry& registry);

// Forces `variant` for the plugin `id` of one part; Error if it has no such variant.
void force_variant(PipelineSpec& spec, const PipelinePart& part, const std::string& id,
                   const std::string& variant, const Registry& registry);
// The forced variant of the plugin `id` of one part, or nullptr.
const std::string* forced_variant(const PipelineSpec& spec, const PipelinePart& part,
                                  const std::string& id);

// N of "cuda:N", 0 of "cuda"; -1 of anything else.
int gpu_number(const std::string& device);
// "auto", "cpu", "cuda" or "cuda:N"; Error otherwise.
void check_device_name(const std::string& device);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CONFIG_PIPELINE_PARTS_H_
