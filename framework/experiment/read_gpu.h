// The traffic of a model's weights, without the model.
#ifndef SIKV_FRAMEWORK_EXPERIMENT_READ_GPU_H_
#define SIKV_FRAMEWORK_EXPERIMENT_READ_GPU_H_

#include "framework/device/device.h"

namespace sikv {

// Enqueues a kernel that reads every byte of `data` once, as fast as the GPU can.
void read_on_gpu(const DeviceBuffer& data, Device& device);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_EXPERIMENT_READ_GPU_H_
