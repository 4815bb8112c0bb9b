// What selectors may need of a prompt beside K, V and its newest queries, and whether it is there.
#ifndef SIKV_FRAMEWORK_PIPELINE_OFFER_H_
#define SIKV_FRAMEWORK_PIPELINE_OFFER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "framework/registry/instance.h"

namespace sikv {

// Last prompt queries that selectors get which do not need all, where the prompt has as many: no
// option asks for more.
inline constexpr int kPromptQueries = SIKV_PROMPT_QUERIES;

inline constexpr const char* kFullTrace =
    "use a trace made by datasets/capture with --layers all --queries all --w-o, as "
    "scripts/fetch_full_trace does";

// What a source of prompts gives.
struct Offer {
  std::string source;                // "datasets/t.h5", "a synthetic source" ...
  int layers = 1, model_layers = 1;  // of the cache and of the model
  int64_t first_query = 0;           // position of the first query that is there
  bool w_o = false;
  std::string remedy = kFullTrace;  // for whoever needs more
};

// "every layer", "the queries of the whole prompt", "w_o": of these what the selector, or what it
// wraps, cannot run without.
std::vector<std::string> needs_of(const SelectorInstance& selector);

// Error naming what the selector, or what it wraps, needs and `offer` lacks, and how to make it.
void check_needs(const SelectorInstance& selector, const Offer& offer);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_PIPELINE_OFFER_H_
