#include "codecs/kivi/kivi.h"

SIKV_PLUGIN("kivi", "1.0.0", SIKV_CPU,
            SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC),
            sikv::key_codec<sikv::make_kivi_keys_ref, sikv::kKiviKeyOptions>("ref"),
            sikv::value_codec<sikv::make_kivi_values_ref, sikv::kKiviValueOptions>("ref"))
