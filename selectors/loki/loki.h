// The loki selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_LOKI_LOKI_H_
#define SIKV_SELECTORS_LOKI_LOKI_H_

#include <memory>

#include "kernels/common/key_selector.h"

namespace sikv::loki {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "0.25",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_option("channels", "32", 1, 256,
               "principal components that a scan reads; no more than a head has channels"),
    text_option("pca", "",
                "file of principal axes, as `sikv dataset pca` writes it; empty: fit them on the "
                "prompt"),
    kFitTokensOption,
};

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::loki

#endif  // SIKV_SELECTORS_LOKI_LOKI_H_
