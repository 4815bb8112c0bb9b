#include "selectors/prhs_psaw/prhs_psaw.h"

SIKV_PLUGIN("prhs_psaw", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::prhs_psaw::make_ref, sikv::prhs_psaw::kOptions>("ref"))
