// The snapkv selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_SNAPKV_SNAPKV_H_
#define SIKV_SELECTORS_SNAPKV_SNAPKV_H_

#include <memory>

#include "kernels/common/window_scores.h"

namespace sikv::snapkv {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "1024",
                  "tokens of the prompt to keep per KV head, window included: a count, or a "
                  "fraction of the prompt"),
    kWindowOption,
    kKernelOption,
    kPoolingOption,
};

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const WindowMath& math);
std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);
std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args);

}  // namespace sikv::snapkv

#endif  // SIKV_SELECTORS_SNAPKV_SNAPKV_H_
