#include "selectors/full/full.h"

SIKV_PLUGIN("full", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::full::make_ref, sikv::kNoOptions, sikv::probe_ref,
                           SIKV_SELECTOR_SELECTS_ALL>("ref"))
