// The pqcache selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_PQCACHE_PQCACHE_H_
#define SIKV_SELECTORS_PQCACHE_PQCACHE_H_

#include <memory>

#include "kernels/common/key_selector.h"

namespace sikv::pqcache {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "0.1",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_choice_option("subspaces", "2", "2|4|8", "parts a key is cut into, one code each"),
    int_option("bits", "6", 1, 8, "of a code: 2^bits centroids per part"),
    int_option("iterations", "10", 3, 300, "of k-means, at most"),
    int_option("sinks", "32", 0, 1 << 20,
               "first tokens of the sequence, which are always taken, out of the budget"),
    float_option("recent", "0.5", 0, 1,
                 "share of the budget for the newest tokens; those in the tail count"),
    kFitTokensOption,
};

// Sums of table entries for one row's tokens.
struct CodeRequest {
  const uint8_t* codes;  // [pages, subspaces, 256]
  const float* tables;   // [G, subspaces, entries]
  int subspaces, entries, group;
  int64_t tokens;
};
// logits [G, stride], stride = score_room(tokens).
using CodeLogits = void (*)(const CodeRequest& request, float* logits, int64_t stride);

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math, CodeLogits code_logits);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::pqcache

#endif  // SIKV_SELECTORS_PQCACHE_PQCACHE_H_
