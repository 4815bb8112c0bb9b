// Copies from global to shared memory that a thread does not wait for until it says so.
#ifndef SIKV_KERNELS_COMMON_ASYNC_COPY_CUH_
#define SIKV_KERNELS_COMMON_ASYNC_COPY_CUH_

#include <cstdint>

namespace sikv::cuda {

// 16 bytes, past L1.
__device__ inline void copy_async_16(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// The same with 8 or 16 bytes; 8 go through L1.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global) {
  if constexpr (kBytes == 16) {
    copy_async_16(shared, global);
  } else {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(global) : "memory");
  }
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_ASYNC_COPY_CUH_
