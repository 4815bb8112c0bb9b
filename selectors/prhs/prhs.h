// The prhs wrapper, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_PRHS_PRHS_H_
#define SIKV_SELECTORS_PRHS_PRHS_H_

#include <memory>

#include "kernels/common/depth_windows.h"
#include "kernels/common/index_sharing.h"
#include "plugins/sdk/plugin.h"

namespace sikv::prhs {

inline constexpr auto kOptions = join_options(
    join_options(std::array{selector_option("the selector that searches in anchor steps")},
                 kSharingOptions),
    join_options(std::array{kFirstLayerOption}, join_options(kPsawOptions, kEtfOptions)));

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);

}  // namespace sikv::prhs

#endif  // SIKV_SELECTORS_PRHS_PRHS_H_
