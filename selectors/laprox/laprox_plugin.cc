#include "selectors/laprox/laprox.h"

#ifdef SIKV_HAS_SIMD
#define LAPROX_CPU                                                                                \
  sikv::scoring_selector<sikv::laprox::make_cpu, sikv::laprox::kOptions, sikv::probe_window_math, \
                         sikv::laprox::kFlags>("cpu")
#else
#define LAPROX_CPU
#endif

SIKV_PLUGIN("laprox", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::scoring_selector<sikv::laprox::make_ref, sikv::laprox::kOptions, sikv::probe_ref,
                                   sikv::laprox::kFlags>("ref"),
            LAPROX_CPU)
