// The prhs_psaw selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_PRHS_PSAW_PRHS_PSAW_H_
#define SIKV_SELECTORS_PRHS_PSAW_PRHS_PSAW_H_

#include <memory>

#include "kernels/common/depth_windows.h"
#include "plugins/sdk/plugin.h"

namespace sikv::prhs_psaw {

inline constexpr std::array kOptions = {kFirstLayerOption, kPsawOptions[0], kPsawOptions[1]};

std::unique_ptr<Selector> make_ref(const CreateArgs& args);

}  // namespace sikv::prhs_psaw

#endif  // SIKV_SELECTORS_PRHS_PSAW_PRHS_PSAW_H_
