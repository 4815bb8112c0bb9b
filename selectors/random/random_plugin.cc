#include "selectors/random/random.h"

SIKV_PLUGIN("random", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::random::make_ref, sikv::random::kOptions>("ref"))
