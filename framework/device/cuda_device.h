// An NVIDIA GPU through the CUDA runtime, in builds with SIKV_CUDA; every build can ask for it.
#ifndef SIKV_FRAMEWORK_DEVICE_CUDA_DEVICE_H_
#define SIKV_FRAMEWORK_DEVICE_CUDA_DEVICE_H_

#include <memory>
#include <string>

#include "framework/device/device.h"

namespace sikv {

// Empty if this build and host can use GPU `ordinal`, else the reason and the remedy.
std::string cuda_refusal(int ordinal = 0);

// Which devices this host serves, for a registry: cpu_only where no GPU can be used.
std::string served_devices(sikv_device_type type);

// Error with cuda_refusal's sentence. `threads` are the host's workers, as of a CPU device.
//
// The device works on a stream of its own that waits for no other. Memory comes from cudaMalloc.
std::unique_ptr<Device> open_cuda_device(int ordinal = 0, int threads = 0);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_DEVICE_CUDA_DEVICE_H_
