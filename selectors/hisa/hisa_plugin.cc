#include "selectors/hisa/hisa.h"

#ifdef SIKV_HAS_SIMD
#define HISA_CPU \
  sikv::selector<sikv::hisa::make_cpu, sikv::hisa::kOptions, sikv::probe_row_math>("cpu")
#else
#define HISA_CPU
#endif

SIKV_PLUGIN("hisa", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::hisa::make_ref, sikv::hisa::kOptions>("ref"), HISA_CPU)
