// Stands in for cuda_device.cc in builds without CUDA.
#include "framework/base/error.h"
#include "framework/device/cuda_device.h"

namespace sikv {

std::string cuda_refusal(int) {
  return "this build has no CUDA support; configure it with -DSIKV_CUDA=ON, or use device cpu";
}

std::string served_devices(sikv_device_type type) {
  return type == SIKV_CPU ? "" : "this build has no CUDA support";
}

std::unique_ptr<Device> open_cuda_device(int, int) {
  throw Error("device cuda: {}", cuda_refusal());
}

}  // namespace sikv
