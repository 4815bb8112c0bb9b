#include "codecs/intq/intq.h"

#ifdef SIKV_HAS_SIMD
#define INTQ_CPU \
  sikv::value_codec<sikv::make_intq_cpu, sikv::kIntqOptions, sikv::probe_intq_cpu>("cpu")
#else
#define INTQ_CPU
#endif

SIKV_PLUGIN("intq", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_VALUE_CODEC),
            sikv::value_codec<sikv::make_intq_ref, sikv::kIntqOptions>("ref"), INTQ_CPU)
