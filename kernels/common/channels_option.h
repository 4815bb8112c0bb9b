// The option `channels` of selectors that score with some channels of a head.
#ifndef SIKV_KERNELS_COMMON_CHANNELS_OPTION_H_
#define SIKV_KERNELS_COMMON_CHANNELS_OPTION_H_

#include <string>

#include "plugins/sdk/plugin.h"

namespace sikv {

inline int channels_of(const CreateArgs& args) {
  const int64_t channels = args.options.integer("channels");
  if (channels > args.shape.head_dim) {
    throw Refused("channels is " + std::to_string(channels) + ", but a head has " +
                  std::to_string(args.shape.head_dim) + "; give at most as many");
  }
  return static_cast<int>(channels);
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_CHANNELS_OPTION_H_
