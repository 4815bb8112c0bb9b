// The prhs_etf selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_PRHS_ETF_PRHS_ETF_H_
#define SIKV_SELECTORS_PRHS_ETF_PRHS_ETF_H_

#include <memory>

#include "kernels/common/depth_windows.h"
#include "plugins/sdk/plugin.h"

namespace sikv::prhs_etf {

inline constexpr std::array kOptions = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    kFirstLayerOption, kEtfOptions[0], kEtfOptions[1]};

std::unique_ptr<Selector> make_ref(const CreateArgs& args);

}  // namespace sikv::prhs_etf

#endif  // SIKV_SELECTORS_PRHS_ETF_PRHS_ETF_H_
