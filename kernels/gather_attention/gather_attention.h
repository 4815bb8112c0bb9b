// The gather_attention kernel, private to this folder: its variants. It takes no options.
#ifndef SIKV_KERNELS_GATHER_ATTENTION_GATHER_ATTENTION_H_
#define SIKV_KERNELS_GATHER_ATTENTION_GATHER_ATTENTION_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::gather_attention {

std::unique_ptr<Kernel> make_ref(const CreateArgs& args);

}  // namespace sikv::gather_attention

#endif  // SIKV_KERNELS_GATHER_ATTENTION_GATHER_ATTENTION_H_
