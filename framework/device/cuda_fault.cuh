// Device code that finds numbers no cache takes.
#ifndef SIKV_FRAMEWORK_DEVICE_CUDA_FAULT_CUH_
#define SIKV_FRAMEWORK_DEVICE_CUDA_FAULT_CUH_

#include "plugins/abi/sikv_abi.h"
#include "plugins/abi/sikv_limits.h"

namespace sikv {

// False for NaN.
__device__ inline bool is_storable(float x) { return fabsf(x) <= SIKV_LARGEST_ELEMENT; }

// Unless another thread was first.
__device__ inline void report_fault(sikv_fault* to, sikv_fault fault) {
  if (atomicCAS(&to->what, 0, fault.what) == 0) {
    to->layer = fault.layer;
    to->sequence = fault.sequence;
    to->head = fault.head;
    to->position = fault.position;
    to->channel = fault.channel;
    to->value = fault.value;
  }
}

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_DEVICE_CUDA_FAULT_CUH_
