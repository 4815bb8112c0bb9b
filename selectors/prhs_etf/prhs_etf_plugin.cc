#include "selectors/prhs_etf/prhs_etf.h"

SIKV_PLUGIN("prhs_etf", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::prhs_etf::make_ref, sikv::prhs_etf::kOptions>("ref"))
