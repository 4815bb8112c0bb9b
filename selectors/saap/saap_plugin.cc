#include "selectors/saap/saap.h"

#ifdef SIKV_HAS_SIMD
#define SAAP_CPU \
  sikv::selector<sikv::saap::make_cpu, sikv::saap::kOptions, sikv::probe_row_math>("cpu")
#else
#define SAAP_CPU
#endif

SIKV_PLUGIN("saap", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::saap::make_ref, sikv::saap::kOptions>("ref"), SAAP_CPU)
