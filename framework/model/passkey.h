// Five digits planted in a long text, asked for at its end: what a cache must not lose.
#ifndef SIKV_FRAMEWORK_MODEL_PASSKEY_H_
#define SIKV_FRAMEWORK_MODEL_PASSKEY_H_

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/model/tokenizer.h"
#include "framework/model/transformer.h"
#include "framework/registry/registry.h"

namespace sikv {

struct PasskeyPlan {
  std::vector<int64_t> lengths;  // tokens of a prompt
  int depths = 5;                // places of the key, from the prompt's start to its end
  int trials = 2;                // keys per (length, depth)
  uint64_t seed = 1;
  int32_t dtype = SIKV_FP16;

  int64_t prompts() const { return std::ssize(lengths) * depths * trials; }
  // Share of the text before the key.
  double depth(int i) const { return depths == 1 ? 0.5 : static_cast<double>(i) / (depths - 1); }
};

struct PasskeyPrompt {
  std::string key;
  std::vector<int32_t> tokens;  // exactly the length asked for
};

// `haystack`: the tokens of a text, at least as many as the prompt has.
PasskeyPrompt passkey_prompt(const Tokenizer& tokenizer, std::span<const int32_t> haystack,
                             int64_t length, double depth, uint64_t seed);

// Keys a pipeline found.
struct PasskeyRow {
  std::string pipeline;
  std::vector<std::vector<int>> found;  // [lengths][depths], out of plan.trials

  int total() const;
};

// One row per pipeline. Every prompt is prefilled once, for all of them. `device_of` opens the
// device of a pipeline. Shows progress; throws Interrupted after Ctrl-C.
std::vector<PasskeyRow> find_passkeys(Transformer& model, const Tokenizer& tokenizer,
                                      std::span<const int32_t> haystack, const PasskeyPlan& plan,
                                      std::span<const PipelineSpec> pipelines,
                                      const Registry& registry,
                                      const std::function<Device&(const PipelineSpec&)>& device_of);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_PASSKEY_H_
