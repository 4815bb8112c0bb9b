// The laprox selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_LAPROX_LAPROX_H_
#define SIKV_SELECTORS_LAPROX_LAPROX_H_

#include <memory>
#include <vector>

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

// norms [prompt_len] of ||v W||_2 for all values v of a row and W [D, hidden], a head's part of the
// output projection.
using ProjectedNorms = std::vector<float> (*)(const sikv_observe_args& args, const CacheView& view,
                                              int row, const float* w);

// As it is written: D * hidden products a token.
std::vector<float> explicit_norms(const sikv_observe_args& args, const CacheView& view, int row,
                                  const float* w);
// By the Gram matrix W W^T: D * D.
std::vector<float> gram_norms(const sikv_observe_args& args, const CacheView& view, int row,
                              const float* w);

struct Math {
  const WindowMath& window;
  ProjectedNorms norms;
};

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const Math& math);
std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);
std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args);

}  // namespace sikv::laprox

#endif  // SIKV_SELECTORS_LAPROX_LAPROX_H_
