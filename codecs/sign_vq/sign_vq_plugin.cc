#include "codecs/sign_vq/sign_vq.h"

#ifdef SIKV_HAS_SIMD
#define SIGN_VQ_CPU \
  sikv::key_codec<sikv::make_sign_vq_cpu, sikv::kSignVqOptions, sikv::probe_sign_vq_cpu>("cpu")
#else
#define SIGN_VQ_CPU
#endif

SIKV_PLUGIN("sign_vq", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_KEY_CODEC),
            sikv::key_codec<sikv::make_sign_vq_ref, sikv::kSignVqOptions>("ref"), SIGN_VQ_CPU)
