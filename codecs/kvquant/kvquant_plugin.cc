#include "codecs/kvquant/kvquant.h"

SIKV_PLUGIN("kvquant", "1.0.0", SIKV_CPU,
            SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC),
            sikv::key_codec<sikv::make_kvquant_keys_ref, sikv::kKvquantOptions>("ref"),
            sikv::value_codec<sikv::make_kvquant_values_ref, sikv::kKvquantOptions>("ref"))
