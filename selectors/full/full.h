// The full selector, private to this folder: its variants. It takes no options.
#ifndef SIKV_SELECTORS_FULL_FULL_H_
#define SIKV_SELECTORS_FULL_FULL_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv::full {

std::unique_ptr<Selector> make_ref(const CreateArgs& args);

}  // namespace sikv::full

#endif  // SIKV_SELECTORS_FULL_FULL_H_
