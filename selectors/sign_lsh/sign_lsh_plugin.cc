#include "selectors/sign_lsh/sign_lsh.h"

#ifdef SIKV_HAS_SIMD
#define SIGN_LSH_CPU \
  sikv::selector<sikv::sign_lsh::make_cpu, sikv::sign_lsh::kOptions, sikv::probe_row_math>("cpu")
#else
#define SIGN_LSH_CPU
#endif

SIKV_PLUGIN("sign_lsh", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::sign_lsh::make_ref, sikv::sign_lsh::kOptions>("ref"), SIGN_LSH_CPU)
