#include "selectors/prhs/prhs.h"

SIKV_PLUGIN("prhs", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::scoring_selector<sikv::prhs::make_ref, sikv::prhs::kOptions>("ref"))
