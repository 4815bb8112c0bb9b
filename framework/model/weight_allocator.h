// Memory of weights: matrices side by side in huge pages.
//
// A decode step streams every weight once. In pages of 4 KiB it waits for page walks, and hardware
// prefetchers stop at the end of each: the products of a step of SmolLM2-135M (135 MB of int8) take two
// cores 6.4 ms so, and 3.3 ms in huge pages with rows requested ahead (weights_only of scripts/bench_eval
// decode). Most matrices of a small model are smaller than one of those.
#ifndef SIKV_FRAMEWORK_MODEL_WEIGHT_ALLOCATOR_H_
#define SIKV_FRAMEWORK_MODEL_WEIGHT_ALLOCATOR_H_

#include <cstddef>

namespace sikv {

// 64-byte aligned; std::bad_alloc where the system has no more. From any thread. A block of
// neighbours goes back to the system with the last of them.
void* allocate_weights(size_t bytes);
void release_weights(void* data) noexcept;

template <typename T>
struct WeightAllocator {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(allocate_weights(n * sizeof(T))); }
  void deallocate(T* data, size_t) noexcept { release_weights(data); }
  friend bool operator==(WeightAllocator, WeightAllocator) { return true; }
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_WEIGHT_ALLOCATOR_H_
