// What one thread needs to find its tokens: the cache view is passed to kernels by value
// (`const __grid_constant__ sikv_cache_view view`), its pointers are device memory.
#ifndef SIKV_KERNELS_COMMON_THREAD_CACHE_CUH_
#define SIKV_KERNELS_COMMON_THREAD_CACHE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "plugins/abi/sikv_abi.h"
#include "plugins/abi/sikv_limits.h"

namespace sikv::cuda {

// One plane of a store: page n at base + n * page_stride.
struct Plane {
  uint8_t* base = nullptr;
  int64_t page_stride = 0;  // bytes

  __device__ uint8_t* page(int64_t number) const { return base + number * page_stride; }
};

// The plane with `role`; base null if the layout has none. Host.
inline Plane plane_of(const sikv_store_view& store, sikv_role role) {
  for (uint32_t i = 0; i < store.layout->num_planes; ++i) {
    if (store.layout->planes[i].role == role) {
      return {static_cast<uint8_t*>(store.planes[i]), store.page_stride_bytes[i]};
    }
  }
  return {};
}

// The side table with `role`, [B, H, count]; null if the layout has none. Host.
inline float* table_of(const sikv_store_view& store, sikv_table_role role) {
  for (uint32_t i = 0; i < store.layout->num_tables; ++i) {
    if (store.layout->tables[i].role == role) return store.tables[i];
  }
  return nullptr;
}

__device__ inline int64_t page_number(const sikv_cache_view& view, int row, int page) {
  return view.page_table[int64_t{row} * view.max_pages + page];
}

// An element of an array in the input's type.
template <typename T>
__device__ inline float to_float(T x);
template <>
__device__ inline float to_float(float x) {
  return x;
}
template <>
__device__ inline float to_float(__half x) {
  return __half2float(x);
}
template <>
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// body(T{}) for the C++ type of an input dtype (fp32, fp16 or bf16). Host.
template <typename Body>
auto with_dtype(int32_t dtype, Body&& body) {
  switch (dtype) {
    case SIKV_FP32:
      return body(float{});
    case SIKV_BF16:
      return body(__nv_bfloat16{});
    default:
      return body(__half{});
  }
}

// body(std::integral_constant<int, D>{}) for D = 64, 96, 128 or 256. Host.
template <typename Body>
auto with_head_dim(int head_dim, Body&& body) {
  switch (head_dim) {
    case 64:
      return body(std::integral_constant<int, 64>{});
    case 96:
      return body(std::integral_constant<int, 96>{});
    case 256:
      return body(std::integral_constant<int, 256>{});
    default:
      return body(std::integral_constant<int, 128>{});
  }
}

// Sets the view's fault unless another thread was first.
__device__ inline void report_fault(const sikv_cache_view& view, sikv_fault_what what, int sequence,
                                    int head, int position, int channel, float value) {
  if (view.fault == nullptr || atomicCAS(&view.fault->what, 0, static_cast<int>(what)) != 0) return;
  view.fault->layer = view.layer;
  view.fault->sequence = sequence;
  view.fault->head = head;
  view.fault->position = position;
  view.fault->channel = channel;
  view.fault->value = value;
}

// False for NaN.
__device__ inline bool is_storable(float x) { return fabsf(x) <= SIKV_LARGEST_ELEMENT; }

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_THREAD_CACHE_CUH_
