// The expected_attention selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_EXPECTED_ATTENTION_EXPECTED_ATTENTION_H_
#define SIKV_SELECTORS_EXPECTED_ATTENTION_EXPECTED_ATTENTION_H_

#include <memory>

#include "kernels/common/rope.h"

namespace sikv::expected_attention {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option(
        "budget", "1024",
        "tokens of the prompt to keep per KV head, sinks included: a count, or a fraction "
        "of the prompt"),
    int_option("sinks", "4", 0, 4096,
               "first tokens of the prompt, always kept; their queries do not count"),
    int_option("future", "512", 1, 65536, "positions behind the prompt to expect queries at"),
    float_option("epsilon", "0", 0, 1, "added to the expected probability of every token"),
    kRopeOption,
    bool_option("value_norm", "true", "weight it by the norm of the token's value"),
};

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);

}  // namespace sikv::expected_attention

#endif  // SIKV_SELECTORS_EXPECTED_ATTENTION_EXPECTED_ATTENTION_H_
