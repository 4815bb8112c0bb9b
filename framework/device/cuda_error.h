// Errors of the CUDA runtime as exceptions. Kept apart from fmt, whose headers nvcc cannot read as
// C++20.
#ifndef SIKV_FRAMEWORK_DEVICE_CUDA_ERROR_H_
#define SIKV_FRAMEWORK_DEVICE_CUDA_ERROR_H_

#include <cuda_runtime.h>

namespace sikv {

// InternalError naming what was tried.
void check_cuda(cudaError_t status, const char* what);

// Right after kernel<<<grid, block, shared, stream>>>: names kernel, shape and stream.
void check_cuda_launch(const char* kernel, dim3 grid, dim3 block, cudaStream_t stream);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_DEVICE_CUDA_ERROR_H_
