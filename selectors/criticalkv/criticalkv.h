// The criticalkv selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_CRITICALKV_CRITICALKV_H_
#define SIKV_SELECTORS_CRITICALKV_CRITICALKV_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::criticalkv {

inline constexpr sikv_option_spec kOptions[] = {
    float_option("first_stage", "0.5", 0, 1,
                 "share of a head's budget that goes by the base's scores alone"),
    float_option("epsilon", "1e-4", 0, 1e30,
                 "added to a score before it is multiplied with the value's norm"),
    selector_option("evicts and scores tokens; its budgets stay, what fills them is chosen anew"),
};

std::unique_ptr<EvictingSelector> make_ref(const CreateArgs& args);

}  // namespace sikv::criticalkv

#endif  // SIKV_SELECTORS_CRITICALKV_CRITICALKV_H_
