#include "selectors/sparq/sparq.h"

#ifdef SIKV_HAS_SIMD
#define SPARQ_CPU \
  sikv::selector<sikv::sparq::make_cpu, sikv::sparq::kOptions, sikv::probe_row_math>("cpu")
#else
#define SPARQ_CPU
#endif

SIKV_PLUGIN("sparq", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::sparq::make_ref, sikv::sparq::kOptions>("ref"), SPARQ_CPU)
