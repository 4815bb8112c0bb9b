// A config file, validated: what to run, on what, and what to measure.
//
// YAML keys and nesting are those of the structs below; every error carries file:line:column, the
// offending value, what is allowed and the nearest valid name.
#ifndef SIKV_FRAMEWORK_CONFIG_CONFIG_H_
#define SIKV_FRAMEWORK_CONFIG_CONFIG_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "framework/registry/registry.h"

namespace sikv {

// One part of a pipeline: a plugin and its options as written.
struct PluginSpec {
  std::string id;
  std::vector<std::pair<std::string, std::string>> options;  // all but `base`
  std::vector<PluginSpec> base;  // of a wrapper: the one selector that it wraps
  std::string where = {};        // "file:line:column" for errors; empty: from no config
};

// Which tokens stay exact beside the selection, served by the framework for every selector.
enum class PinRule { kLastQuery, kSnapKv, kFirst };

// What a table of several pipelines says of one and takes it from: the keys of an entry of
// `pipelines:` beside those of the pipeline itself.
struct EntrySpec {
  std::string label;                 // short name; empty: the printed form
  std::string source;                // one of `sources:`; empty: `source:`
  std::vector<std::string> budgets;  // in place of the config's
  std::string fitted;                // on what it was trained or calibrated; empty: on nothing
  std::string reconstruction;        // what its paper leaves open; empty: nothing
};

// codec + codec > selector > kernel, and where it runs. Printed form and back: pipeline_text.h.
struct PipelineSpec {
  PluginSpec keys, values, selector, kernel;
  int pinned = 64;  // option of every selector
  PinRule pin = PinRule::kLastQuery;
  bool keep_generated = false;  // generated tokens never leave the tail
  std::string device = "auto";  // cpu | cuda | auto
  // "<family>.<id>" -> variant, family one of keys, values, selector, attention.
  std::map<std::string, std::string> force;
  EntrySpec entry;
};

struct ModelSpec {
  std::string preset;  // empty, or the preset the numbers came from
  int layers = 1, query_heads = 1, kv_heads = 1, head_dim = 64;
  double rope_theta = 10000.0;
  int64_t weight_bytes = 0;  // bf16 weights read once per step; 0 when unknown
};

struct SyntheticSpec {
  std::string kind = "clustered";  // gaussian | clustered | needle
  std::vector<int64_t> context = {4096};
  std::vector<int> batch = {1};
  bool batch_max = false;  // `batch: max`: grow until memory is full
  std::string dtype = "fp16";
  uint64_t seed = 1;
};

struct SourceSpec {
  std::filesystem::path trace;  // empty: synthetic
  std::optional<SyntheticSpec> synthetic;
  std::vector<int> layers;  // of the trace; empty = all it holds
  int64_t prompt = 0;       // tokens prefilled; 0 = all but `steps`
  int64_t steps = 0;        // decode steps; 0 = what is left after the prompt
  // Of named sources only.
  std::vector<int> judge;  // layers whose metrics count; empty = all
  std::string make;        // the command that makes the trace; without one it must be there
  bool missing = false;    // the trace is not there, and `make` says how to make it
};

struct MeasureSpec {
  int64_t steps = 0;   // 0 = the source's
  int64_t warmup = 0;  // steps replayed before measuring; replayed, never skipped
  std::vector<std::string> metrics = {"memory", "latency", "recall", "dropped_mass",
                                      "output_error"};
};

// How a table of several pipelines is divided.
enum class GroupBy { kBudget, kMemory };

struct Config {
  std::filesystem::path file;
  std::optional<ModelSpec> model;  // absent: taken from the trace
  SourceSpec source;
  std::map<std::string, SourceSpec> sources;  // by name, for pipelines that need another
  std::vector<PipelineSpec> pipelines;        // `pipeline:` gives one, `pipelines:` several
  std::vector<std::string> budgets;           // `budgets:`; empty = each pipeline's own
  GroupBy group_by = GroupBy::kBudget;
  MeasureSpec measure;
  int threads = 0;  // 0 = all cores
  std::vector<std::filesystem::path> plugin_path;
};

// Whether a command reads the source: else a config may lack it, and its traces need not be there.
enum class SourceUse { kRead, kIgnored };

// Reads and validates `file`. `sets` are "dotted.key=value" overrides, applied before validation.
// Paths in a config are relative to the folder it lies in, else to the working folder.
// `registry` gives ids and options; plugin_path libraries are added to it first.
Config load_config(const std::filesystem::path& file, const std::vector<std::string>& sets,
                   Registry& registry, SourceUse source = SourceUse::kRead);

// The same from text; `name` stands in for the file in errors.
Config parse_config(const std::string& text, const std::string& name,
                    const std::vector<std::string>& sets, Registry& registry,
                    SourceUse source = SourceUse::kRead);

// One spec per (pipeline, budget): `budgets` override the selector option `budget` where a
// selector has one, or else what it wraps. An entry's own `budgets` come before the config's.
std::vector<PipelineSpec> expand_budgets(const Config& config, const Registry& registry);

// The options `budget` that `budgets` override, as in "budget=192 of quest".
std::vector<std::string> overridden_budgets(const Config& config, const Registry& registry);

// Selectors without a budget for `budgets` to set, by id; those that select everything only if no
// other selector has one either.
std::vector<std::string> without_budget(const Config& config, const Registry& registry);

// The source of one of its pipelines.
const SourceSpec& source_of(const Config& config, const PipelineSpec& pipeline);
// The config with that source as its own; Error if its trace is still to be made.
Config on_source_of(const Config& config, const PipelineSpec& pipeline);

// Known model shapes by name (llama-3.1-8b ...); Error with the nearest name otherwise.
ModelSpec model_preset(std::string_view name);
std::vector<std::string> model_presets();

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CONFIG_CONFIG_H_
