// The adakv selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_ADAKV_ADAKV_H_
#define SIKV_SELECTORS_ADAKV_ADAKV_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::adakv {

inline constexpr sikv_option_spec kOptions[] = {
    float_option("alpha", "0.2", 0, 1,
                 "share of a head's budget that it keeps; the rest goes to the best of all heads"),
    selector_option("evicts and scores tokens; its budget is split anew over the heads"),
};

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);

}  // namespace sikv::adakv

#endif  // SIKV_SELECTORS_ADAKV_ADAKV_H_
