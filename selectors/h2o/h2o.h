// The h2o selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_H2O_H2O_H_
#define SIKV_SELECTORS_H2O_H2O_H_

#include <memory>

#include "kernels/common/window_scores.h"

namespace sikv::h2o {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "0.2",
                  "tokens to keep per KV head, recent ones included: a count, or a fraction of the "
                  "prompt"),
    float_option("recent", "0.5", 0, 1, "part of the budget that is the newest tokens"),
};

inline constexpr uint32_t kFlags = SIKV_SELECTOR_SELECTS_ALL | SIKV_SELECTOR_NEEDS_ALL_QUERIES;

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const WindowMath& math);
std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);
std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args);

}  // namespace sikv::h2o

#endif  // SIKV_SELECTORS_H2O_H2O_H_
