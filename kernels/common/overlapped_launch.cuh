// Launches that overlap (sm_90 and newer): one made with launch_overlapped may begin while the one
// before it still runs, whatever that is, and waits for it on the device. From kernel to kernel of a
// graph that takes 0.5 us where the end of one and the start of the next take 1.5.
#ifndef SIKV_KERNELS_COMMON_OVERLAPPED_LAUNCH_CUH_
#define SIKV_KERNELS_COMMON_OVERLAPPED_LAUNCH_CUH_

#include "kernels/common/cuda_launch.h"

namespace sikv::cuda {

// Until the launch before is over and its writes are visible. Every block of a kernel launched so
// calls it ahead of its first access to memory that others write: then all launches before that one
// are over too.
__device__ inline void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch begin where blocks of this one leave room, once all of them have come here:
// after wait_for_launch_before, so that the next one need not think of launches before this one.
__device__ inline void start_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// In clusters of `cluster` blocks along x; more than 1 need a kernel compiled for sm_90.
template <typename Args>
void launch_overlapped(std::string_view name, void (*kernel)(Args), dim3 grid, dim3 block,
                       size_t shared_bytes, cudaStream_t stream, const Args& args,
                       unsigned cluster = 1) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (runs_as(kernel) >= 90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }
  cudaLaunchKernelEx(&config, kernel, args);
  check_launch(name, grid, block, stream);
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_OVERLAPPED_LAUNCH_CUH_
