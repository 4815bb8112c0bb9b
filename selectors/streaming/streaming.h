// The streaming selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_STREAMING_STREAMING_H_
#define SIKV_SELECTORS_STREAMING_STREAMING_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::streaming {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "256",
                  "tokens to keep, sinks included: a count, or a fraction of the current length"),
    int_option("sinks", "4", 0, 4096, "first tokens of the sequence, always kept"),
    bool_option("evict", "false",
                "give the pages of all other tokens back; budget must then be a count"),
};

std::unique_ptr<EvictingSelector> make_ref(const CreateArgs& args);

}  // namespace sikv::streaming

#endif  // SIKV_SELECTORS_STREAMING_STREAMING_H_
