#include "framework/model/weight_allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace sikv {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kBlock = size_t{64} << 20;
constexpr size_t kAlignment = 64;

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

struct Block {
  std::byte* base;
  size_t bytes, used, live;  // live: matrices in it
};

class Blocks {
 public:
  void* allocate(size_t bytes) {
    const std::lock_guard lock(mutex_);
    const size_t size = rounded(bytes, kAlignment);
    if (blocks_.empty() || blocks_.back().bytes - blocks_.back().used < size) {
      blocks_.push_back(map(std::max(rounded(size, kHugePage), kBlock)));
    }
    Block& block = blocks_.back();
    ++block.live;
    return block.base + std::exchange(block.used, block.used + size);
  }

  void release(void* data) {
    const std::lock_guard lock(mutex_);
    const auto block = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& candidate) {
      return data >= candidate.base && data < candidate.base + candidate.bytes;
    });
    if (--block->live > 0) return;
    munmap(block->base, block->bytes);
    blocks_.erase(block);
  }

 private:
  // At the start of a huge page.
  static Block map(size_t bytes) {
    void* const data = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    auto* const first = static_cast<std::byte*>(data);
    const size_t skipped =
        rounded(reinterpret_cast<uintptr_t>(first), kHugePage) - reinterpret_cast<uintptr_t>(first);
    if (skipped > 0) munmap(first, skipped);
    if (skipped < kHugePage) munmap(first + skipped + bytes, kHugePage - skipped);
    madvise(first + skipped, bytes, MADV_HUGEPAGE);
    return {first + skipped, bytes, 0, 0};
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
};

// Never destroyed: static models may outlive it.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

}  // namespace

void* allocate_weights(size_t bytes) { return blocks().allocate(bytes); }
void release_weights(void* data) noexcept { blocks().release(data); }

}  // namespace sikv
