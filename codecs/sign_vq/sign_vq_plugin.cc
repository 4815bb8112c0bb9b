#include "codecs/sign_vq/sign_vq.h"

SIKV_PLUGIN("sign_vq", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_KEY_CODEC),
            sikv::key_codec<sikv::make_sign_vq_ref, sikv::kSignVqOptions>("ref"))
