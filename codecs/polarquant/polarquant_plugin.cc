#include "codecs/polarquant/polarquant.h"

SIKV_PLUGIN("polarquant", "1.0.0", SIKV_CPU,
            SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC),
            sikv::key_codec<sikv::make_polarquant_keys_ref, sikv::kNoOptions>("ref"),
            sikv::value_codec<sikv::make_polarquant_values_ref, sikv::kNoOptions>("ref"))
