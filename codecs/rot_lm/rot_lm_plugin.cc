#include "codecs/rot_lm/rot_lm.h"

#ifdef SIKV_HAS_SIMD
#define ROT_LM_CPU                                                                             \
  sikv::key_codec<sikv::make_rot_lm_keys_cpu, sikv::kRotLmKeyOptions, sikv::probe_rot_lm_cpu>( \
      "cpu"),                                                                                  \
      sikv::value_codec<sikv::make_rot_lm_values_cpu, sikv::kRotLmValueOptions,                \
                        sikv::probe_rot_lm_cpu>("cpu")
#else
#define ROT_LM_CPU
#endif

SIKV_PLUGIN("rot_lm", "1.0.0", SIKV_CPU,
            SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC),
            sikv::key_codec<sikv::make_rot_lm_keys_ref, sikv::kRotLmKeyOptions>("ref"),
            sikv::value_codec<sikv::make_rot_lm_values_ref, sikv::kRotLmValueOptions>("ref"),
            ROT_LM_CPU)
