#include "selectors/tova/tova.h"

#ifdef SIKV_HAS_SIMD
#define TOVA_CPU                                                                              \
  sikv::scoring_selector<sikv::tova::make_cpu, sikv::tova::kOptions, sikv::probe_window_math, \
                         sikv::tova::kFlags>("cpu")
#else
#define TOVA_CPU
#endif

SIKV_PLUGIN("tova", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::scoring_selector<sikv::tova::make_ref, sikv::tova::kOptions, sikv::probe_ref,
                                   sikv::tova::kFlags>("ref"),
            TOVA_CPU)
