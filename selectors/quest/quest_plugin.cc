#include "selectors/quest/quest.h"

SIKV_PLUGIN("quest", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::quest::make_ref, sikv::quest::kOptions>("ref"))
