// The tova selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_TOVA_TOVA_H_
#define SIKV_SELECTORS_TOVA_TOVA_H_

#include <memory>

#include "kernels/common/window_scores.h"

namespace sikv::tova {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "512",
                  "tokens to keep per KV head: a count, or a fraction of the prompt"),
};

inline constexpr uint32_t kFlags = SIKV_SELECTOR_SELECTS_ALL;

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const WindowMath& math);
std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);
std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args);

}  // namespace sikv::tova

#endif  // SIKV_SELECTORS_TOVA_TOVA_H_
