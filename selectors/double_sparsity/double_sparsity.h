// The double_sparsity selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_DOUBLE_SPARSITY_DOUBLE_SPARSITY_H_
#define SIKV_SELECTORS_DOUBLE_SPARSITY_DOUBLE_SPARSITY_H_

#include <memory>

#include "kernels/common/key_selector.h"

namespace sikv::double_sparsity {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "256",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_option("channels", "16", 1, 256,
               "heavy channels that a scan reads; no more than a head has"),
    choice_option("ranking", "qk", "qk|q|k",
                  "what makes a channel heavy: mean |q| times mean |k|, mean |q| or mean |k|"),
    kFitTokensOption,
};

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::double_sparsity

#endif  // SIKV_SELECTORS_DOUBLE_SPARSITY_DOUBLE_SPARSITY_H_
