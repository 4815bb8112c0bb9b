#include "codecs/turboquant/turboquant.h"

SIKV_PLUGIN(
    "turboquant", "1.0.0", SIKV_CPU,
    SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC),
    sikv::key_codec<sikv::make_turboquant_keys_ref, sikv::kTurboquantKeyOptions>("ref"),
    sikv::value_codec<sikv::make_turboquant_values_ref, sikv::kTurboquantValueOptions>("ref"))
