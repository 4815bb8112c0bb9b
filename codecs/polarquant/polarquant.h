// Private to codecs/polarquant.
#ifndef SIKV_CODECS_POLARQUANT_POLARQUANT_H_
#define SIKV_CODECS_POLARQUANT_POLARQUANT_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv {

std::unique_ptr<Codec> make_polarquant_keys_ref(const CreateArgs& args);
std::unique_ptr<Codec> make_polarquant_values_ref(const CreateArgs& args);

}  // namespace sikv

#endif  // SIKV_CODECS_POLARQUANT_POLARQUANT_H_
