#include "selectors/prhs_cis/prhs_cis.h"

#ifdef SIKV_HAS_SIMD
#define PRHS_CIS_CPU                                                                             \
  sikv::selector<sikv::prhs_cis::make_cpu, sikv::prhs_cis::kOptions, sikv::prhs_cis::probe_cpu>( \
      "cpu")
#else
#define PRHS_CIS_CPU
#endif

SIKV_PLUGIN("prhs_cis", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::prhs_cis::make_ref, sikv::prhs_cis::kOptions>("ref"), PRHS_CIS_CPU)
