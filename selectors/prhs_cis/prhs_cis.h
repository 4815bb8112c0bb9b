// The prhs_cis selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_PRHS_CIS_PRHS_CIS_H_
#define SIKV_SELECTORS_PRHS_CIS_PRHS_CIS_H_

#include <functional>
#include <memory>

#include "kernels/common/exact_scores.h"
#include "kernels/common/index_sharing.h"
#include "plugins/sdk/plugin.h"

namespace sikv::prhs_cis {

inline constexpr auto kOptions =
    join_options(std::array{budget_option(
                     "budget", "2048",
                     "tokens to select: a count, or a fraction of the sequence's current length")},
                 kSharingOptions);

// The selector around what scores keys, one scorer for each worker.
std::unique_ptr<Selector> make_selector(const CreateArgs& args,
                                        std::unique_ptr<RowScorer> (*make_scorer)());

std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);
int32_t probe_cpu(const sikv_device* device, sikv_message* reason);

}  // namespace sikv::prhs_cis

#endif  // SIKV_SELECTORS_PRHS_CIS_PRHS_CIS_H_
