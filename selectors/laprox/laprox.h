// The laprox selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_LAPROX_LAPROX_H_
#define SIKV_SELECTORS_LAPROX_LAPROX_H_

#include <functional>
#include <memory>

#include "kernels/common/window_scores.h"

namespace sikv::laprox {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option(
        "budget", "1024",
        "tokens of the prompt to keep per layer and KV head in the mean, window included: a "
        "count, or a fraction of the prompt"),
    kWindowOption,
    kKernelOption,
    choice_option("pooling", "mean", "mean|max", "how they are pooled"),
    choice_option(
        "group", "attention", "attention|score",
        "what is averaged over the query heads of a KV head: their attention and the norms "
        "of what they make of the value, or the products of both"),
    bool_option("share_heads", "false", "rank by the mean over a layer's KV heads"),
};

inline constexpr uint32_t kFlags = SIKV_SELECTOR_SELECTS_ALL | SIKV_SELECTOR_NEEDS_W_O |
                                   SIKV_SELECTOR_NEEDS_ALL_LAYERS | SIKV_SELECTOR_EVICTS_TOGETHER;

// ||v W||_2 of a value v [D].
using ProjectedNorm = std::function<float(const float* v)>;

// Of W [D, hidden], a head's part of the output projection, which outlives the answer. As it is
// written: D * hidden products a token.
ProjectedNorm explicit_norm(const float* w, int head_dim, int hidden);
// By the Gram matrix W W^T: D * D, and D * D * hidden / 2 once.
ProjectedNorm gram_norm(const float* w, int head_dim, int hidden);

struct Math {
  const WindowMath& window;
  ProjectedNorm (*norm)(const float* w, int head_dim, int hidden);
};

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const Math& math);
std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);
std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args);

}  // namespace sikv::laprox

#endif  // SIKV_SELECTORS_LAPROX_LAPROX_H_
