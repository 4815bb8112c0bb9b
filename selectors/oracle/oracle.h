// The oracle selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_ORACLE_ORACLE_H_
#define SIKV_SELECTORS_ORACLE_ORACLE_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::oracle {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
};

std::unique_ptr<Selector> make_ref(const CreateArgs& args);

}  // namespace sikv::oracle

#endif  // SIKV_SELECTORS_ORACLE_ORACLE_H_
