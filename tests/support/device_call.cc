#include "tests/support/device_call.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <string>

#include "framework/base/error.h"

namespace sikv::testing {
namespace {

// A block keeps its host address modulo this on the device, and so what it says about alignment.
constexpr size_t kAlignment = 256;

// Blocks of earlier calls by size: a test makes many calls with the same few sizes.
class Pool {
 public:
  void* take(Device& device, size_t bytes) {
    const auto found = free_.find(bytes);
    if (found == free_.end()) return device.allocate(bytes);
    void* const block = found->second;
    free_.erase(found);
    free_bytes_ -= bytes;
    return block;
  }
  void give(Device& device, void* block, size_t bytes) {
    free_.emplace(bytes, block);
    free_bytes_ += bytes;
    if (free_bytes_ <= kMostFree) return;
    for (const auto& [size, address] : free_) device.release(address, size);
    free_.clear();
    free_bytes_ = 0;
  }

 private:
  static constexpr size_t kMostFree = size_t{1} << 30;
  std::multimap<size_t, void*> free_;
  size_t free_bytes_ = 0;
};

Pool& pool() {
  static auto* pool = new Pool();
  return *pool;
}

}  // namespace

DeviceCall::DeviceCall(Device& device) : device_(device) {}

DeviceCall::~DeviceCall() {
  for (const Block& block : blocks_) pool().give(device_, block.allocation, block.allocated);
}

void* DeviceCall::place(void* host, size_t bytes, Way way) {
  if (on_host() || host == nullptr) return host;
  // Few sizes occur, since allocating is slow; the block lies at the end, where a sanitizer sees
  // what reads past it.
  const size_t allocated = std::bit_ceil(bytes + 2 * kAlignment);
  auto* const allocation = static_cast<uint8_t*>(pool().take(device_, allocated));
  uint8_t* const last = allocation + allocated - bytes;
  uint8_t* const device =
      last - (reinterpret_cast<uintptr_t>(last) - reinterpret_cast<uintptr_t>(host)) % kAlignment;
  blocks_.push_back({static_cast<uint8_t*>(host), device, bytes, way, allocation, allocated});
  if (bytes > 0) device_.copy_in(blocks_.back().device, host, bytes);
  return blocks_.back().device;
}

void* DeviceCall::address(void* host) const {
  if (host == nullptr) return nullptr;
  auto* const byte = static_cast<uint8_t*>(host);
  for (const Block& block : blocks_) {
    if (byte >= block.host && byte <= block.host + block.bytes) {
      return block.device + (byte - block.host);
    }
  }
  SIKV_ASSERT(!"memory that was not placed on the device");
  return nullptr;
}

sikv_rows DeviceCall::rows(const RowsPart& part) {
  sikv_rows rows = part.rows;
  rows.data = in(static_cast<const uint8_t*>(rows.data), part.data_bytes);
  rows.first = in(part.first);
  rows.count = in(part.count);
  return rows;
}

const sikv_cache_view& DeviceCall::view(const TestCache& cache) {
  if (on_host()) return cache.view();
  for (const TestCache::Block& block : cache.blocks()) {
    place(block.data, block.bytes, block.writable ? Way::kBoth : Way::kIn);
  }
  view_ = cache.view();
  view_.page_table = at(view_.page_table);
  view_.encoded_len = at(view_.encoded_len);
  for (sikv_store_view* store : {&view_.key, &view_.value}) {
    for (void*& plane : store->planes) plane = at(static_cast<uint8_t*>(plane));
    for (float*& table : store->tables) table = at(table);
  }
  cache.attach_gpu_codecs(view_);
  view_.tail_k = at(static_cast<const uint8_t*>(view_.tail_k));
  view_.tail_v = at(static_cast<const uint8_t*>(view_.tail_v));
  view_.tail_len = at(view_.tail_len);
  view_.pinned_k = at(static_cast<const uint8_t*>(view_.pinned_k));
  view_.pinned_v = at(static_cast<const uint8_t*>(view_.pinned_v));
  view_.pinned_slots = at(view_.pinned_slots);
  view_.pinned_len = at(view_.pinned_len);
  view_.fault = static_cast<sikv_fault*>(place(&fault_, sizeof fault_, Way::kBoth));
  return view_;
}

void DeviceCall::finish() {
  if (on_host()) return;
  // Through one block, so that the host waits once: with other tests on the GPU each wait may last
  // until it is this one's turn again.
  size_t total = 0;
  for (const Block& block : blocks_) total += block.way == Way::kBoth ? block.bytes : 0;
  const size_t allocated = std::bit_ceil(total);
  auto* const gathered = static_cast<uint8_t*>(pool().take(device_, allocated));
  size_t offset = 0;
  for (const Block& block : blocks_) {
    if (block.way != Way::kBoth || block.bytes == 0) continue;
    device_.copy_in(gathered + offset, block.device, block.bytes);
    offset += block.bytes;
  }
  std::vector<uint8_t> bytes(total);
  device_.copy_out(bytes.data(), gathered, total);
  pool().give(device_, gathered, allocated);
  offset = 0;
  for (const Block& block : blocks_) {
    if (block.way != Way::kBoth || block.bytes == 0) continue;
    std::memcpy(block.host, bytes.data() + offset, block.bytes);
    offset += block.bytes;
  }
  if (fault_.what == 0) return;
  constexpr const char* kWhat[] = {"", "K", "V", "Q"};
  const std::string value = std::isnan(fault_.value) ? "NaN" : std::to_string(fault_.value);
  throw Error("{} is {} at layer {}, head {}, position {}, sequence {}, channel {}",
              kWhat[fault_.what], value, fault_.layer, fault_.head, fault_.position,
              fault_.sequence, fault_.channel);
}

}  // namespace sikv::testing
