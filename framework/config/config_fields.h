// The scalar fields of a config, as option lists: what config.cc accepts and what the JSON schema
// says come from here. A field without a default must be given.
#ifndef SIKV_FRAMEWORK_CONFIG_CONFIG_FIELDS_H_
#define SIKV_FRAMEWORK_CONFIG_CONFIG_FIELDS_H_

#include <array>

#include "plugins/abi/sikv_abi.h"

namespace sikv {

namespace fields {

constexpr sikv_option_spec integer(const char* name, const char* default_value, double min,
                                   double max, const char* help) {
  return {name, SIKV_OPTION_INT, 0, min, max, nullptr, default_value, help};
}
constexpr sikv_option_spec number(const char* name, const char* default_value, double min,
                                  double max, const char* help) {
  return {name, SIKV_OPTION_FLOAT, 0, min, max, nullptr, default_value, help};
}
constexpr sikv_option_spec choice(const char* name, const char* default_value, const char* choices,
                                  const char* help) {
  return {name, SIKV_OPTION_CHOICE, 0, 0, 0, choices, default_value, help};
}

// Positions are 32-bit, in the cache and across the plugin boundary.
inline constexpr double kMaxTokens = 2147483647;

inline constexpr std::array<sikv_option_spec, 6> kModel = {{
    integer("layers", nullptr, 1, 4096, "transformer layers"),
    integer("query_heads", nullptr, 1, 4096, "query heads, a multiple of kv_heads"),
    integer("kv_heads", nullptr, 1, 4096, "key/value heads"),
    {"head_dim", SIKV_OPTION_INT, 0, 0, 0, "64|96|128|256", nullptr, "channels per head"},
    number("rope_theta", "10000", 0, 1e15, "base of the rotary embedding, 0 when unknown"),
    number("weight_bytes", "0", 0, 1e15, "bytes of weights read once per step, 0 when unknown"),
}};

inline constexpr sikv_option_spec kPrompt =
    integer("prompt", "0", 0, kMaxTokens, "tokens prefilled; 0 = all but steps");
inline constexpr sikv_option_spec kSourceSteps =
    integer("steps", "0", 0, kMaxTokens, "decode steps; 0 = what is left after the prompt");
inline constexpr sikv_option_spec kLayer =
    integer("layers", "0", 0, 4095, "a layer of the trace; without layers: all it holds");

inline constexpr sikv_option_spec kSynthKind =
    choice("kind", "clustered", "gaussian|clustered|needle", "distribution of K, V and Q");
inline constexpr sikv_option_spec kContext =
    integer("context", "4096", 1, kMaxTokens, "prompt tokens of every sequence");
inline constexpr sikv_option_spec kBatch =
    integer("batch", "1", 1, 65536, "sequences; max = the largest batch that memory can hold");
inline constexpr sikv_option_spec kSynthDtype =
    choice("dtype", "fp16", "fp16|bf16|fp32", "element type of K, V and Q");
inline constexpr sikv_option_spec kSeed =
    integer("seed", "1", 0, 9007199254740991.0, "of the random numbers");

inline constexpr sikv_option_spec kMeasureSteps =
    integer("steps", "0", 0, kMaxTokens, "steps to judge; 0 = those of the source");
inline constexpr sikv_option_spec kWarmup =
    integer("warmup", "0", 0, kMaxTokens, "steps replayed before those, and not judged");
inline constexpr sikv_option_spec kMetric = choice(
    "metrics", "memory", "memory|latency|recall|dropped_mass|selection_error|output_error|kv_error",
    "what to measure");

inline constexpr sikv_option_spec kGroupBy =
    choice("group_by", "budget", "budget|memory",
           "how tables of several pipelines are divided: by budget, or by bytes per token");
inline constexpr sikv_option_spec kJudge =
    integer("judge", "0", 0, 4095, "a layer whose metrics count; without it: all that run");

inline constexpr sikv_option_spec kThreads =
    integer("threads", "0", 0, 4096, "CPU workers; 0 = one per core");
inline constexpr sikv_option_spec kBudget = {
    "budgets", SIKV_OPTION_BUDGET,
    0,         0,
    0,         nullptr,
    "256",     "each pipeline runs once per budget, where its selector has one"};

// Keys of each map.
inline constexpr std::array kTopKeys = {"model",     "source",     "sources",  "pipeline",
                                        "pipelines", "budgets",    "group_by", "measure",
                                        "threads",   "plugin_path"};
inline constexpr std::array kModelKeys = {"preset",   "layers",     "query_heads", "kv_heads",
                                          "head_dim", "rope_theta", "weight_bytes"};
inline constexpr std::array kSourceKeys = {"trace", "layers", "prompt",   "steps",
                                           "judge", "make",   "synthetic"};
// Of an entry of `sources`, which is a trace.
inline constexpr std::array kNamedSourceKeys = {"trace", "layers", "prompt",
                                                "steps", "judge",  "make"};
inline constexpr std::array kSyntheticKeys = {"kind", "context", "batch", "dtype", "seed"};
inline constexpr std::array kPipelineKeys = {"keys",      "values", "selector",
                                             "attention", "device", "force"};
// Of an entry of `pipelines`: `pipeline` holds the one-line form, in place of the keys above.
inline constexpr std::array kEntryKeys = {"label",  "pipeline",       "source",
                                          "fitted", "reconstruction", "budgets"};
inline constexpr std::array kMeasureKeys = {"steps", "warmup", "metrics"};

}  // namespace fields
}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CONFIG_CONFIG_FIELDS_H_
