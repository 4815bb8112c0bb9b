#include "selectors/snapkv/snapkv.h"

#ifdef SIKV_HAS_SIMD
#define SNAPKV_CPU                                                                                \
  sikv::scoring_selector<sikv::snapkv::make_cpu, sikv::snapkv::kOptions, sikv::probe_window_math, \
                         SIKV_SELECTOR_SELECTS_ALL>("cpu")
#else
#define SNAPKV_CPU
#endif

SIKV_PLUGIN("snapkv", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::scoring_selector<sikv::snapkv::make_ref, sikv::snapkv::kOptions, sikv::probe_ref,
                                   SIKV_SELECTOR_SELECTS_ALL>("ref"),
            SNAPKV_CPU)
