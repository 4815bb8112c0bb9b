#include "selectors/self_indexing_attention/self_indexing_attention.h"

#ifdef SIKV_HAS_SIMD
#define SELF_INDEXING_ATTENTION_CPU                                                                \
  sikv::selector<sikv::self_indexing_attention::make_cpu, sikv::self_indexing_attention::kOptions, \
                 sikv::probe_row_math>("cpu")
#else
#define SELF_INDEXING_ATTENTION_CPU
#endif

SIKV_PLUGIN("self_indexing_attention", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::self_indexing_attention::make_ref,
                           sikv::self_indexing_attention::kOptions>("ref"),
            SELF_INDEXING_ATTENTION_CPU)
