#include <algorithm>

#include "framework/device/cuda_error.h"
#include "framework/experiment/read_gpu.h"

namespace sikv {
namespace {

constexpr int kThreads = 256, kUnroll = 8, kBlocksPerMultiprocessor = 8;

// Four loads of 16 bytes in flight per thread saturate HBM at this occupancy; eight leave room for
// GPUs with a longer latency. The sum is used so that no load is left out.
__global__ void __launch_bounds__(kThreads)
    read_all(const uint4* data, int64_t n, unsigned* never_written) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  unsigned sum = 0;
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (; i + (kUnroll - 1) * step < n; i += kUnroll * step) {
    uint4 x[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) x[j] = __ldcs(data + i + j * step);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) sum |= x[j].x | x[j].y | x[j].z | x[j].w;
  }
  for (; i < n; i += step) sum |= data[i].x | data[i].y | data[i].z | data[i].w;
  if (sum == 0x5117u) *never_written = sum;  // buffers are zeroed
}

}  // namespace

void read_on_gpu(const DeviceBuffer& data, Device& device) {
  const int64_t n = static_cast<int64_t>(data.bytes() / sizeof(uint4));
  if (n == 0) return;
  const auto stream = static_cast<cudaStream_t>(device.stream());
  const unsigned blocks =
      static_cast<unsigned>(device.info().multiprocessors * kBlocksPerMultiprocessor);
  read_all<<<blocks, kThreads, 0, stream>>>(data.as<const uint4>(), n, data.as<unsigned>());
  check_cuda_launch("read_all", blocks, kThreads, stream);
}

}  // namespace sikv
