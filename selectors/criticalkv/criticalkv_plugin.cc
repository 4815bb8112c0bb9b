#include "selectors/criticalkv/criticalkv.h"

// Without `score`: what it keeps does not follow one order, so nobody can split it anew.
SIKV_PLUGIN(
    "criticalkv", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
    sikv::evicting_selector<sikv::criticalkv::make_ref, sikv::criticalkv::kOptions, sikv::probe_ref,
                            SIKV_SELECTOR_NEEDS_W_O | SIKV_SELECTOR_SELECTS_ALL>("ref"))
