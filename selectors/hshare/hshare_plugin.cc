#include "selectors/hshare/hshare.h"

#ifdef SIKV_HAS_SIMD
#define HSHARE_CPU \
  sikv::selector<sikv::hshare::make_cpu, sikv::hshare::kOptions, sikv::probe_row_math>("cpu")
#else
#define HSHARE_CPU
#endif

SIKV_PLUGIN("hshare", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::hshare::make_ref, sikv::hshare::kOptions>("ref"), HSHARE_CPU)
