#include "framework/cache/page_pool.h"

#include <algorithm>
#include <functional>

#include "framework/base/error.h"

namespace sikv {

PagePool::PagePool(Device& device, std::span<const uint64_t> plane_page_bytes, int64_t capacity)
    : page_bytes_(plane_page_bytes.begin(), plane_page_bytes.end()), capacity_(capacity) {
  for (uint64_t bytes : page_bytes_) {
    planes_.emplace_back(device, bytes * static_cast<uint64_t>(capacity));
  }
}

int32_t PagePool::take() {
  int64_t page = never_used_;
  if (!freed_.empty()) {
    std::pop_heap(freed_.begin(), freed_.end(), std::greater<>());
    page = freed_.back();
    freed_.pop_back();
  } else if (never_used_ == capacity_) {
    throw Error(
        "all {} pages of the cache are in use: the sequences grew past the max_tokens they were "
        "planned for",
        capacity_);
  } else {
    ++never_used_;
  }
  ++in_use_;
  return static_cast<int32_t>(page);
}

void PagePool::give_back(int32_t page) {
  SIKV_ASSERT(page >= 0 && page < never_used_);
  freed_.push_back(page);
  std::push_heap(freed_.begin(), freed_.end(), std::greater<>());
  --in_use_;
  untrimmed_.push_back(page);
}

bool PagePool::trim() {
  if (untrimmed_.empty()) return false;
  std::sort(freed_.begin(), freed_.end());  // still a min-heap
  std::sort(untrimmed_.begin(), untrimmed_.end());
  auto fresh = untrimmed_.begin();
  for (size_t i = 0; i < freed_.size();) {
    size_t end = i + 1;
    while (end < freed_.size() && freed_[end] == freed_[end - 1] + 1) ++end;
    // The whole run: pages smaller than the system's go back with their neighbours.
    fresh = std::lower_bound(fresh, untrimmed_.end(), freed_[i]);
    if (fresh != untrimmed_.end() && *fresh <= freed_[end - 1]) {
      for (size_t p = 0; p < planes_.size(); ++p) {
        planes_[p].discard(page_bytes_[p] * static_cast<uint64_t>(freed_[i]),
                           page_bytes_[p] * (end - i));
      }
    }
    i = end;
  }
  // Behind the last page that was ever in use, a huge page may reach into what never was.
  for (size_t p = 0; p < planes_.size(); ++p) {
    planes_[p].discard(page_bytes_[p] * static_cast<uint64_t>(never_used_),
                       page_bytes_[p] * static_cast<uint64_t>(capacity_ - never_used_));
  }
  untrimmed_.clear();
  return true;
}

}  // namespace sikv
