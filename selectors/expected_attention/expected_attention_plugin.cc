#include "selectors/expected_attention/expected_attention.h"

SIKV_PLUGIN(
    "expected_attention", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
    sikv::scoring_selector<sikv::expected_attention::make_ref, sikv::expected_attention::kOptions,
                           sikv::probe_ref,
                           SIKV_SELECTOR_SELECTS_ALL | SIKV_SELECTOR_NEEDS_ALL_QUERIES>("ref"))
