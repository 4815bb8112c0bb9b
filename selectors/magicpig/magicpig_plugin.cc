#include "selectors/magicpig/magicpig.h"

SIKV_PLUGIN("magicpig", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::magicpig::make_ref, sikv::magicpig::kOptions, sikv::probe_ref,
                           SIKV_SELECTOR_WEIGHS>("ref"))
