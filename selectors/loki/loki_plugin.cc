#include "selectors/loki/loki.h"

#ifdef SIKV_HAS_SIMD
#define LOKI_CPU \
  sikv::selector<sikv::loki::make_cpu, sikv::loki::kOptions, sikv::probe_row_math>("cpu")
#else
#define LOKI_CPU
#endif

SIKV_PLUGIN("loki", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::loki::make_ref, sikv::loki::kOptions>("ref"), LOKI_CPU)
