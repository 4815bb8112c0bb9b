// What a cache does to its own memory, on the device where it lies. KvCache keeps the counts; these
// move the bytes. Kernels of a GPU also advance the device's copies of the counts, so that a
// recorded step runs without the host.
#ifndef SIKV_FRAMEWORK_CACHE_CACHE_OPS_H_
#define SIKV_FRAMEWORK_CACHE_CACHE_OPS_H_

#include <cstdint>
#include <memory>
#include <span>

#include "framework/device/device.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {

// One layer: the view, and again, to be written, the counts in it. B sequences, H KV heads.
struct LayerArrays {
  sikv_cache_view view;
  int32_t* encoded_len;    // [B, H]
  int32_t* next_position;  // [B, H]
  int32_t* positions;      // [B, H, max_pages * 256] or null
  int32_t* tail_len;       // [B]
};

// What one flush encodes; written by begin_flush on a GPU, by KvCache on the CPU.
struct FlushArrays {
  int32_t* count;       // [B] 256 where the tail is a whole page, else 0
  int32_t* first_slot;  // [B, H] where its tokens go
};

class CacheOps {
 public:
  virtual ~CacheOps() = default;

  // k, v [B, H, D] go to the end of the tails.
  virtual void append(const LayerArrays& layer, const void* k, const void* v) = 0;
  // Tokens past the last whole page of each prompt, fewer than 256, become the tails.
  virtual void fill_tails(const LayerArrays& layer, const sikv_rows& k, const sikv_rows& v) = 0;
  // Exact copies of the pinned slots; slot s was prompt row s.
  virtual void copy_pins(const LayerArrays& layer, const sikv_rows& k, const sikv_rows& v) = 0;
  // Tokens `keep` (ascending) of a row move to slots 0, 1, ... in every plane.
  virtual void move_tokens(const LayerArrays& layer, int row, std::span<const int32_t> keep) = 0;
  // On a GPU only: counts that begin and end a flush.
  virtual void begin_flush(const LayerArrays& layer, const FlushArrays& flush) = 0;
  virtual void end_flush(const LayerArrays& layer, const FlushArrays& flush) = 0;
  // On a GPU only: adds encoded tokens, exact tokens and rows that a selection of `counts` [B, H]
  // attends to to sums [3].
  virtual void count_attended(const LayerArrays& layer, const int32_t* counts, uint64_t* sums) = 0;
};

// The device outlives them.
std::unique_ptr<CacheOps> make_cache_ops(Device& device);
std::unique_ptr<CacheOps> make_cuda_cache_ops(Device& device);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CACHE_CACHE_OPS_H_
