#include "codecs/qjl/qjl.h"

SIKV_PLUGIN("qjl", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_KEY_CODEC),
            sikv::key_codec<sikv::make_qjl_keys_ref, sikv::kQjlOptions>("ref"))
