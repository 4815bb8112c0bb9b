#include "selectors/pqcache/pqcache.h"

#ifdef SIKV_HAS_SIMD
#define PQCACHE_CPU \
  sikv::selector<sikv::pqcache::make_cpu, sikv::pqcache::kOptions, sikv::probe_row_math>("cpu")
#else
#define PQCACHE_CPU
#endif

SIKV_PLUGIN("pqcache", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::pqcache::make_ref, sikv::pqcache::kOptions>("ref"), PQCACHE_CPU)
