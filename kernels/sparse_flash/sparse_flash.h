// The sparse_flash kernel, private to this folder: its variants. It takes no options.
#ifndef SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_H_
#define SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::sparse_flash {

std::unique_ptr<Kernel> make_ref(const CreateArgs& args);
std::unique_ptr<Kernel> make_cpu(const CreateArgs& args);

}  // namespace sikv::sparse_flash

#endif  // SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_H_
