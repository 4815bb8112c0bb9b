#include "selectors/oracle/oracle.h"

SIKV_PLUGIN("oracle", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::oracle::make_ref, sikv::oracle::kOptions>("ref"))
