#include "selectors/pyramidkv/pyramidkv.h"

#ifdef SIKV_HAS_SIMD
#define PYRAMIDKV_CPU                                                          \
  sikv::scoring_selector<sikv::pyramidkv::make_cpu, sikv::pyramidkv::kOptions, \
                         sikv::probe_window_math, SIKV_SELECTOR_SELECTS_ALL>("cpu")
#else
#define PYRAMIDKV_CPU
#endif

SIKV_PLUGIN("pyramidkv", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::scoring_selector<sikv::pyramidkv::make_ref, sikv::pyramidkv::kOptions,
                                   sikv::probe_ref, SIKV_SELECTOR_SELECTS_ALL>("ref"),
            PYRAMIDKV_CPU)
