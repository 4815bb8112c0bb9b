#include "selectors/adakv/adakv.h"

SIKV_PLUGIN("adakv", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::scoring_selector<sikv::adakv::make_ref, sikv::adakv::kOptions, sikv::probe_ref,
                                   SIKV_SELECTOR_SELECTS_ALL>("ref"))
