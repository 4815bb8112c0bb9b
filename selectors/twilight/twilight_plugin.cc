#include "selectors/twilight/twilight.h"

#ifdef SIKV_HAS_SIMD
#define TWILIGHT_CPU                                                         \
  sikv::scoring_selector<sikv::twilight::make_cpu, sikv::twilight::kOptions, \
                         sikv::twilight::probe_cpu>("cpu")
#else
#define TWILIGHT_CPU
#endif

SIKV_PLUGIN("twilight", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::scoring_selector<sikv::twilight::make_ref, sikv::twilight::kOptions>("ref"),
            TWILIGHT_CPU)
