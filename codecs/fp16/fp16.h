// Private to codecs/fp16.
#ifndef SIKV_CODECS_FP16_FP16_H_
#define SIKV_CODECS_FP16_FP16_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv {

std::unique_ptr<Codec> make_fp16_keys_ref(const CreateArgs& args);
std::unique_ptr<Codec> make_fp16_values_ref(const CreateArgs& args);

int32_t probe_fp16_cpu(const sikv_device* device, sikv_message* reason);
std::unique_ptr<Codec> make_fp16_keys_cpu(const CreateArgs& args);
std::unique_ptr<Codec> make_fp16_values_cpu(const CreateArgs& args);

}  // namespace sikv

#endif  // SIKV_CODECS_FP16_FP16_H_
