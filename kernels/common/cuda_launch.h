// Host side of CUDA plugins: errors, launches, the probe.
#ifndef SIKV_KERNELS_COMMON_CUDA_LAUNCH_H_
#define SIKV_KERNELS_COMMON_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <cinttypes>
#include <cstdio>
#include <string>
#include <string_view>

#include "plugins/sdk/plugin.h"

namespace sikv::cuda {

// The number of a descriptor's smallest architecture: 90 for "sm_90,sm_100"; 0 for "".
constexpr int oldest_architecture(std::string_view architectures) {
  int oldest = 0, number = 0;
  for (size_t i = 0; i <= architectures.size(); ++i) {
    const char c = i < architectures.size() ? architectures[i] : ',';
    if (c >= '0' && c <= '9') {
      number = number * 10 + (c - '0');
    } else if (c == ',') {
      if (number > 0 && (oldest == 0 || number < oldest)) oldest = number;
      number = 0;
    }
  }
  return oldest;
}

// Probe of CUDA variants: 100 on a GPU that the library was built for.
inline int32_t probe(const sikv_device* device, sikv_message* reason) {
  if (device->type != SIKV_CUDA) {
    sdk::write_message(reason, "it runs on CUDA devices, and device is cpu");
    return 0;
  }
  if (device->compute_capability < oldest_architecture(SIKV_PLUGIN_ARCHITECTURES)) {
    const std::string text = "it was built for " + std::string(SIKV_PLUGIN_ARCHITECTURES) +
                             " and the GPU is sm_" + std::to_string(device->compute_capability) +
                             "; build with preset cuda-all";
    sdk::write_message(reason, text.c_str());
    return 0;
  }
  return 100;
}

inline cudaStream_t stream(const Launch& launch) {
  return static_cast<cudaStream_t>(launch.stream);
}

// Throws with what was tried: a call of the runtime.
inline void check(cudaError_t status, std::string_view what) {
  if (status == cudaSuccess) return;
  throw PluginBug(std::string(what) + " failed: " + cudaGetErrorString(status));
}

// What the runtime knows of a kernel on the current device.
template <typename Kernel>
cudaFuncAttributes attributes_of(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "asking for a kernel's attributes");
  return attributes;
}
// The architecture a kernel was compiled for, as __CUDA_ARCH__ / 10 said in it: below the GPU's where
// the library was built for an older one.
template <typename Kernel>
int runs_as(Kernel* kernel) {
  return attributes_of(kernel).ptxVersion;
}

// Right after kernel<<<grid, block, shared, stream>>>: names kernel, shape and stream, in the words
// of the framework's check_cuda_launch.
inline void check_launch(std::string_view kernel, dim3 grid, dim3 block, cudaStream_t stream) {
  const cudaError_t status = cudaPeekAtLastError();
  if (status == cudaSuccess) return;
  cudaGetLastError();
  const auto shape = [](dim3 d) {
    return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
  };
  char address[24];
  std::snprintf(address, sizeof address, "0x%" PRIxPTR, reinterpret_cast<uintptr_t>(stream));
  throw PluginBug("kernel " + std::string(kernel) + " <<<" + shape(grid) + ", " + shape(block) +
                  ">>> on stream " + address +
                  " could not be launched: " + cudaGetErrorString(status));
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_CUDA_LAUNCH_H_
