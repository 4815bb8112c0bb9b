#include "selectors/rabitq/rabitq.h"

#ifdef SIKV_HAS_SIMD
#define RABITQ_CPU \
  sikv::selector<sikv::rabitq::make_cpu, sikv::rabitq::kOptions, sikv::probe_row_math>("cpu")
#else
#define RABITQ_CPU
#endif

SIKV_PLUGIN("rabitq", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::rabitq::make_ref, sikv::rabitq::kOptions>("ref"), RABITQ_CPU)
