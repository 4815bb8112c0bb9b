// The self_indexing_attention selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_SELF_INDEXING_ATTENTION_SELF_INDEXING_ATTENTION_H_
#define SIKV_SELECTORS_SELF_INDEXING_ATTENTION_SELF_INDEXING_ATTENTION_H_

#include <memory>

#include "kernels/common/key_selector.h"
#include "kernels/common/sign_codes.h"
#include "plugins/layouts/rotation.h"

namespace sikv::self_indexing_attention {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_option("query_bits", "1", 1, 8, "of a channel of the rotated query; 1: its sign"),
};

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math, SignLogits sign_logits);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::self_indexing_attention

#endif  // SIKV_SELECTORS_SELF_INDEXING_ATTENTION_SELF_INDEXING_ATTENTION_H_
