// The hisa selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_HISA_HISA_H_
#define SIKV_SELECTORS_HISA_HISA_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::hisa {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_choice_option("block_tokens", "128", "16|32|64|128|256",
                      "neighbouring tokens that share one pooled key"),
    int_option("blocks", "64", 0, 1 << 20,
               "whose tokens are scored, the first and the last among them; 0: a quarter of all; "
               "more where the budget needs them"),
};

std::unique_ptr<Selector> make_ref(const CreateArgs& args);

}  // namespace sikv::hisa

#endif  // SIKV_SELECTORS_HISA_HISA_H_
