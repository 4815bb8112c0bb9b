#include "codecs/fp16/fp16.h"

#ifdef SIKV_HAS_SIMD
#define FP16_CPU                                                                            \
  sikv::key_codec<sikv::make_fp16_keys_cpu, sikv::kNoOptions, sikv::probe_fp16_cpu>("cpu"), \
      sikv::value_codec<sikv::make_fp16_values_cpu, sikv::kNoOptions, sikv::probe_fp16_cpu>("cpu")
#else
#define FP16_CPU
#endif

SIKV_PLUGIN("fp16", "1.0.0", SIKV_CPU,
            SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC),
            sikv::key_codec<sikv::make_fp16_keys_ref, sikv::kNoOptions>("ref"),
            sikv::value_codec<sikv::make_fp16_values_ref, sikv::kNoOptions>("ref"), FP16_CPU)
