// The hshare selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_HSHARE_HSHARE_H_
#define SIKV_SELECTORS_HSHARE_HSHARE_H_

#include <memory>

#include "kernels/common/row_math.h"
#include "plugins/sdk/plugin.h"

namespace sikv::hshare {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_option("channels", "32", 1, 256,
               "label channels that selections are scored with, at most D"),
    int_option("period", "2", 1, 1 << 20, "steps from one selection to the next"),
    float_option("share_layers", "0.5", 0, 1,
                 "share of the layers that take the selection of an earlier layer"),
    float_option("share_heads", "0.5", 0, 1,
                 "share of a layer's KV heads that take the selection of an earlier head"),
    int_option("prompt_queries", "32", 1, 4096,
               "last queries of the prompt, at most, that the sharing is found with"),
};

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::hshare

#endif  // SIKV_SELECTORS_HSHARE_HSHARE_H_
