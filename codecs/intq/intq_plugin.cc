#include "codecs/intq/intq.h"

SIKV_PLUGIN("intq", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_VALUE_CODEC),
            sikv::value_codec<sikv::make_intq_ref, sikv::kIntqOptions>("ref"))
