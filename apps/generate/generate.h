// sikv generate: text from a model with a pipeline as its KV cache.
#ifndef SIKV_APPS_GENERATE_GENERATE_H_
#define SIKV_APPS_GENERATE_GENERATE_H_

#include "apps/common/command.h"

namespace sikv {

Command add_generate(CLI::App& app);

}  // namespace sikv

#endif  // SIKV_APPS_GENERATE_GENERATE_H_
