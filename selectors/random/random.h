// The random selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_RANDOM_RANDOM_H_
#define SIKV_SELECTORS_RANDOM_RANDOM_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::random {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_option("seed", "1", 0, 1e9, "another seed, other tokens"),
};

std::unique_ptr<Selector> make_ref(const CreateArgs& args);

}  // namespace sikv::random

#endif  // SIKV_SELECTORS_RANDOM_RANDOM_H_
