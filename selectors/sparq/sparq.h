// The sparq selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_SPARQ_SPARQ_H_
#define SIKV_SELECTORS_SPARQ_SPARQ_H_

#include <memory>

#include "kernels/common/key_selector.h"

namespace sikv::sparq {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "128",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_option("channels", "32", 1, 256,
               "channels that a scan reads, the largest of each query; no more than a head has"),
    int_option("local", "32", 0, 1 << 20,
               "newest tokens that are always taken: those in the tail are in any case, the others "
               "come out of the budget"),
};

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::sparq

#endif  // SIKV_SELECTORS_SPARQ_SPARQ_H_
