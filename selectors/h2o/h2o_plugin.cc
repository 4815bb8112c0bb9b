#include "selectors/h2o/h2o.h"

#ifdef SIKV_HAS_SIMD
#define H2O_CPU                                                                             \
  sikv::scoring_selector<sikv::h2o::make_cpu, sikv::h2o::kOptions, sikv::probe_window_math, \
                         sikv::h2o::kFlags>("cpu")
#else
#define H2O_CPU
#endif

SIKV_PLUGIN("h2o", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::scoring_selector<sikv::h2o::make_ref, sikv::h2o::kOptions, sikv::probe_ref,
                                   sikv::h2o::kFlags>("ref"),
            H2O_CPU)
