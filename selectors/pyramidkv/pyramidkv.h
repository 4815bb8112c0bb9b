// The pyramidkv selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_PYRAMIDKV_PYRAMIDKV_H_
#define SIKV_SELECTORS_PYRAMIDKV_PYRAMIDKV_H_

#include <memory>

#include "kernels/common/window_scores.h"

namespace sikv::pyramidkv {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "1024",
                  "tokens of the prompt to keep per KV head on the mean of all layers, window "
                  "included: a count, or a fraction of the prompt"),
    float_option("beta", "20", 1, 1000, "the last layer gets this part of a mean share"),
    kWindowOption,
    kKernelOption,
    kPoolingOption,
};

// Tokens beside the window that each of `layers` layers keeps of `competing`: falling by equal
// steps from 2 share - share / beta to share / beta, or from `competing` where that is less; the sum
// is exactly layers * share. share < competing.
std::vector<int64_t> layer_shares(int layers, int64_t share, int64_t competing, double beta);

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const WindowMath& math);
std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);
std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args);

}  // namespace sikv::pyramidkv

#endif  // SIKV_SELECTORS_PYRAMIDKV_PYRAMIDKV_H_
