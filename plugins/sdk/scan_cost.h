// What a selector read to decide: the counters `scan_bytes` and `runs`, by which tables of methods
// charge each for its own index.
#ifndef SIKV_PLUGINS_SDK_SCAN_COST_H_
#define SIKV_PLUGINS_SDK_SCAN_COST_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <string_view>

#include "plugins/abi/sikv_abi.h"
#include "plugins/sdk/view.h"

namespace sikv {

class ScanCost {
 public:
  // One row's decision, after reading `bytes` of index, keys or the selector's own state. Query,
  // side tables and lookup tables, a few hundred bytes however long the row, do not count. Thread
  // safe.
  void add(int64_t bytes) {
    bytes_.fetch_add(bytes, std::memory_order_relaxed);
    runs_.fetch_add(1, std::memory_order_relaxed);
  }

  void push(const std::function<void(std::string_view, double)>& push) const {
    push("runs", static_cast<double>(runs_.load()));
    push("scan_bytes", static_cast<double>(bytes_.load()));
  }

 private:
  std::atomic<int64_t> bytes_{0}, runs_{0};
};

// Bytes that `tokens` tokens take in one plane, and in all planes of a layout.
inline int64_t plane_bytes(const sikv_plane& plane, int64_t tokens) {
  return tokens * plane.bytes_per_tile / plane.tile_tokens;
}
inline int64_t stored_bytes(const sikv_layout& layout, int64_t tokens) {
  int64_t bytes = 0;
  for (uint32_t i = 0; i < layout.num_planes; ++i) bytes += plane_bytes(layout.planes[i], tokens);
  return bytes;
}

// Bytes of a row's keys: `slots` of the stored ones, and all exact ones, pinned or in the tail.
inline int64_t row_key_bytes(const CacheView& view, int row, int64_t slots) {
  const int64_t exact =
      std::ssize(view.pinned_slots(row)) + view.tail_len(row / view.num_kv_heads());
  return stored_bytes(view.key().layout().raw(), slots) +
         exact * view.head_dim() * sikv_dtype_bytes(view.dtype());
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_SCAN_COST_H_
