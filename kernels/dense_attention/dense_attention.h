// The dense_attention kernel, private to this folder: its variants. It takes no options.
#ifndef SIKV_KERNELS_DENSE_ATTENTION_DENSE_ATTENTION_H_
#define SIKV_KERNELS_DENSE_ATTENTION_DENSE_ATTENTION_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::dense_attention {

// Refused unless the layout of `what` is raw.v1.
void require_raw(const LayoutView& layout, const char* what);

std::unique_ptr<Kernel> make_ref(const CreateArgs& args);
std::unique_ptr<Kernel> make_cpu(const CreateArgs& args);

}  // namespace sikv::dense_attention

#endif  // SIKV_KERNELS_DENSE_ATTENTION_DENSE_ATTENTION_H_
