// The sign_lsh selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_SIGN_LSH_SIGN_LSH_H_
#define SIKV_SELECTORS_SIGN_LSH_SIGN_LSH_H_

#include <memory>

#include "kernels/common/key_selector.h"
#include "kernels/common/sign_codes.h"

namespace sikv::sign_lsh {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_choice_option("bits", "128", "32|64|128|256|512", "of a hash"),
    bool_option("norm", "true", "weight a token's agreement with the norm of its key"),
    bool_option("center", "false", "take the prompt's mean key off before hashing"),
    int_option("seed", "0", 0, 1 << 30, "of the hyperplanes"),
    kFitTokensOption,
};

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math, SignLogits sign_logits);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::sign_lsh

#endif  // SIKV_SELECTORS_SIGN_LSH_SIGN_LSH_H_
