// The quest selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_QUEST_QUEST_H_
#define SIKV_SELECTORS_QUEST_QUEST_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::quest {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_choice_option("page_tokens", "16", "8|16|32|64|128|256",
                      "tokens that share one summary and are chosen together"),
};

std::unique_ptr<Selector> make_ref(const CreateArgs& args);

}  // namespace sikv::quest

#endif  // SIKV_SELECTORS_QUEST_QUEST_H_
