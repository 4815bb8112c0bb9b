#include "selectors/double_sparsity/double_sparsity.h"

#ifdef SIKV_HAS_SIMD
#define DOUBLE_SPARSITY_CPU                                                        \
  sikv::selector<sikv::double_sparsity::make_cpu, sikv::double_sparsity::kOptions, \
                 sikv::probe_row_math>("cpu")
#else
#define DOUBLE_SPARSITY_CPU
#endif

SIKV_PLUGIN("double_sparsity", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::double_sparsity::make_ref, sikv::double_sparsity::kOptions>("ref"),
            DOUBLE_SPARSITY_CPU)
