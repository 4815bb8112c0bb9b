#include "selectors/hisa/hisa.h"

SIKV_PLUGIN("hisa", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::hisa::make_ref, sikv::hisa::kOptions>("ref"))
