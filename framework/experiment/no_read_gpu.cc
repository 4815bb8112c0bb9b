// Stands in for read_gpu.cu in builds without CUDA.
#include "framework/base/error.h"
#include "framework/experiment/read_gpu.h"

namespace sikv {

void read_on_gpu(const DeviceBuffer&, Device&) {
  throw InternalError("a CUDA device in a build without CUDA");
}

}  // namespace sikv
