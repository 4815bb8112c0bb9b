#include "framework/model/passkey.h"

#include <algorithm>
#include <cmath>

#include "framework/base/error.h"
#include "framework/base/progress.h"
#include "framework/base/random.h"
#include "framework/config/pipeline_text.h"
#include "framework/model/generate.h"

namespace sikv {
namespace {

// A space, five digits, and what a tokenizer may put between them.
constexpr int kAnswerTokens = 7;

}  // namespace

PasskeyPrompt passkey_prompt(const Tokenizer& tokenizer, std::span<const int32_t> haystack,
                             int64_t length, double depth, uint64_t seed) {
  PasskeyPrompt prompt;
  Random random(seed);
  for (int i = 0; i < 5; ++i) prompt.key += static_cast<char>('0' + random.below(10));
  const auto needle = tokenizer.encode("\n\nThe pass key is " + prompt.key + ". Remember it. " +
                                       prompt.key + " is the pass key.\n\n");
  const auto question = tokenizer.encode("\n\nWhat is the pass key? The pass key is");
  const int64_t rest = length - std::ssize(needle) - std::ssize(question);
  if (rest < 0 || rest > std::ssize(haystack)) {
    throw Error(
        "a passkey prompt of {} tokens needs from {} to {}: change --lengths, or give a "
        "longer text",
        length, std::ssize(needle) + std::ssize(question),
        std::ssize(haystack) + std::ssize(needle) + std::ssize(question));
  }
  const auto middle = haystack.begin() + std::lround(depth * static_cast<double>(rest));
  prompt.tokens.assign(haystack.begin(), middle);
  prompt.tokens.insert(prompt.tokens.end(), needle.begin(), needle.end());
  prompt.tokens.insert(prompt.tokens.end(), middle, haystack.begin() + rest);
  prompt.tokens.insert(prompt.tokens.end(), question.begin(), question.end());
  return prompt;
}

int PasskeyRow::total() const {
  int sum = 0;
  for (const auto& of_length : found) {
    for (const int n : of_length) sum += n;
  }
  return sum;
}

std::vector<PasskeyRow> find_passkeys(
    Transformer& model, const Tokenizer& tokenizer, std::span<const int32_t> haystack,
    const PasskeyPlan& plan, std::span<const PipelineSpec> pipelines, const Registry& registry,
    const std::function<Device&(const PipelineSpec&)>& device_of) {
  std::vector<PasskeyRow> rows;
  for (const PipelineSpec& spec : pipelines) {
    rows.push_back(
        {pipeline_text(spec, registry),
         std::vector(plan.lengths.size(), std::vector<int>(static_cast<size_t>(plan.depths)))});
  }
  GenerateOptions options;
  options.max_tokens = kAnswerTokens;
  options.dtype = plan.dtype;
  Progress progress("passkeys", plan.prompts() * std::ssize(rows));
  for (size_t l = 0; l < plan.lengths.size(); ++l) {
    for (int d = 0; d < plan.depths; ++d) {
      for (int trial = 0; trial < plan.trials; ++trial) {
        const uint64_t cell = (l * static_cast<size_t>(plan.depths) + static_cast<size_t>(d)) *
                                  static_cast<size_t>(plan.trials) +
                              static_cast<size_t>(trial);
        PasskeyPrompt prompt = passkey_prompt(tokenizer, haystack, plan.lengths[l], plan.depth(d),
                                              derive_seed(plan.seed, cell));
        Generator generator(model, std::move(prompt.tokens), options);
        for (size_t p = 0; p < rows.size(); ++p) {
          const Generated answer =
              generator.run(pipelines[p], registry, device_of(pipelines[p]), [](int32_t) {});
          const bool found = tokenizer.decode(answer.tokens).find(prompt.key) != std::string::npos;
          rows[p].found[l][static_cast<size_t>(d)] += found;
          progress.add();
        }
      }
    }
  }
  return rows;
}

}  // namespace sikv
