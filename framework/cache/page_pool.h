// Pages of one cache: planes side by side, a free-list over page numbers.
//
//   plane 0  | page 0 | page 1 | page 2 | ...      page n of plane p starts at
//   plane 1  | page 0 | page 1 | page 2 | ...      base[p] + n * page_bytes[p]
//
// Planes that share lines lie in one of these, one line after the other.
//
// A plane of its own per field keeps the index codes of consecutive pages contiguous, so that a
// scan streams, and lets a page number stand for the same tokens in every plane.
#ifndef SIKV_FRAMEWORK_CACHE_PAGE_POOL_H_
#define SIKV_FRAMEWORK_CACHE_PAGE_POOL_H_

#include <cstdint>
#include <span>
#include <vector>

#include "framework/device/device.h"

namespace sikv {

class PagePool {
 public:
  // Reserves `capacity` pages whose planes take `plane_page_bytes` bytes each.
  PagePool(Device& device, std::span<const uint64_t> plane_page_bytes, int64_t capacity);

  // The lowest free page, so that a pool that is filled once hands out consecutive numbers. Error
  // when all pages are taken.
  int32_t take();
  void give_back(int32_t page);
  // Gives the memory of free pages back to the system where the device can, whole runs at once.
  // False if none was freed since the last time.
  bool trim();

  int64_t capacity() const { return capacity_; }
  int64_t in_use() const { return in_use_; }
  int num_planes() const { return static_cast<int>(planes_.size()); }
  void* plane(int i) const { return planes_[static_cast<size_t>(i)].as<>(); }
  uint64_t page_bytes(int plane) const { return page_bytes_[static_cast<size_t>(plane)]; }

 private:
  std::vector<uint64_t> page_bytes_;
  std::vector<DeviceBuffer> planes_;
  std::vector<int32_t> freed_;      // min-heap
  std::vector<int32_t> untrimmed_;  // given back since trim; some may be taken again
  int64_t capacity_;
  int64_t never_used_ = 0;  // pages from here on were never handed out
  int64_t in_use_ = 0;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CACHE_PAGE_POOL_H_
