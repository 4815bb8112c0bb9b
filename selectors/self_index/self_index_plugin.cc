#include "selectors/self_index/self_index.h"

#ifdef SIKV_HAS_SIMD
#define SELF_INDEX_CPU                                                   \
  sikv::selector<sikv::self_index::make_cpu, sikv::self_index::kOptions, \
                 sikv::self_index::probe_cpu>("cpu")
#else
#define SELF_INDEX_CPU
#endif

SIKV_PLUGIN("self_index", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::self_index::make_ref, sikv::self_index::kOptions>("ref"),
            SELF_INDEX_CPU)
