#include "selectors/streaming/streaming.h"

SIKV_PLUGIN("streaming", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::evicting_selector<sikv::streaming::make_ref, sikv::streaming::kOptions>("ref"))
