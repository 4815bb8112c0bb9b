// The compressed KV cache of a batch: pages, tail and pinned tokens of every (layer, sequence, KV
// head), and the view of them that plugins get.
//
// Prefill and decode both go through the same steps: rows of K and V are encoded into whole pages
// by the codecs, what does not fill a page waits in the tail. A full tail is encoded when the next
// token arrives, so the newest token is always exact.
//
// Shapes: L layers, B sequences, H KV heads, D head_dim; row = b * H + h.
#ifndef SIKV_FRAMEWORK_CACHE_KV_CACHE_H_
#define SIKV_FRAMEWORK_CACHE_KV_CACHE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "framework/cache/ledger.h"
#include "framework/cache/page_pool.h"
#include "framework/device/device.h"
#include "plugins/abi/sikv_codec.h"

namespace sikv {

struct CacheOptions {
  int pinned_capacity = 64;  // exact copies per row
  int tail_capacity = SIKV_PAGE_TOKENS;
};

class KvCache {
 public:
  // One side's layout and the codec that reads it (for decode, through the view).
  struct Store {
    sikv_layout layout;
    const sikv_codec_table* codec;
    void* codec_self;
  };

  // Host bytes of page tables, lengths and pinned slots while nothing is evicted.
  static uint64_t page_table_bytes(const sikv_shape& shape, const CacheOptions& options);

  KvCache(Device& device, const sikv_shape& shape, Store key, Store value, CacheOptions options);

  // What plugins see of one layer. Pointers stay valid until the next call that changes the cache.
  sikv_cache_view view(int layer) const;

  const sikv_shape& shape() const { return shape_; }
  int num_rows() const { return shape_.max_sequences * shape_.num_kv_heads; }
  int encoded_len(int layer, int row) const;
  int tail_len(int layer, int sequence) const;
  int tail_capacity() const { return options_.tail_capacity; }

  // Gives row `row` the pages for `tokens` more encoded tokens and returns its first free slot;
  // the tokens count as encoded from here on.
  int32_t extend(int layer, int row, int tokens);

  // Copies rows [H, D] of one token to the end of a sequence's tail. The tail must have room.
  void push_tail(int layer, int sequence, const void* k, const void* v);
  // Fills the tail from rows t in [from, from + count) of sequence b.
  void fill_tail(int layer, int sequence, const sikv_rows& k, const sikv_rows& v, int from,
                 int count);
  void clear_tail(int layer, int sequence);
  // The tail as rows to encode; a sequence's count is `count` where `due[b]`, else 0.
  struct TailRows {
    sikv_rows k, v;
    std::vector<int32_t> first, count;
  };
  TailRows tail_rows(int layer, const std::vector<bool>& due, int count) const;

  // Keeps exact copies of `slots` (ascending) of a row; slot s was prompt row `s` of k and v.
  void pin(int layer, int row, std::span<const int32_t> slots, const sikv_rows& k,
           const sikv_rows& v);

  // Keeps only `keep` (ascending) and pinned slots of a row: tokens move together, pages behind
  // them go back to the pool. Error if a plane shares bytes between tokens that part.
  void evict(int layer, int row, std::span<const int32_t> keep);

  // Forgets a sequence in every layer.
  void clear(int sequence);

  // Bytes of pages in use by role, side tables, tail, pinned, page tables.
  Ledger ledger() const;
  // Bytes of all planes of the pages in use per encoded token and KV head; 0 while nothing is.
  double bytes_per_token() const;
  int64_t pages_in_use() const { return pool_.in_use(); }

 private:
  struct Layer {
    std::vector<int32_t> page_table;   // [B, H, max_pages]
    std::vector<int32_t> encoded_len;  // [B, H]
    std::vector<int32_t> positions;    // [B, H, max_pages * 256], empty until something is evicted
    std::vector<int32_t> next_position;  // [B, H] of the next encoded token; evicted ones count too
    std::vector<int32_t> tail_len;       // [B]
    std::vector<int32_t> pinned_slots;   // [B, H, pinned_capacity]
    std::vector<int32_t> pinned_len;     // [B, H]
    DeviceBuffer tail_k, tail_v;         // [B, tail_capacity, H, D]
    DeviceBuffer pinned_k, pinned_v;     // [B, H, pinned_capacity, D]
    std::vector<DeviceBuffer> key_tables, value_tables;  // [B, H, count] fp32 each
  };

  int pages_of(int layer, int row) const;
  void move_tokens(int layer, int row, std::span<const int32_t> keep);
  uint8_t* page(int layer, int row, int slot, int plane) const;
  const sikv_plane& plane(int i) const;
  int num_planes() const;

  Device& device_;
  sikv_shape shape_;
  Store key_, value_;
  CacheOptions options_;
  int max_pages_;
  PagePool pool_;
  std::vector<Layer> layers_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CACHE_KV_CACHE_H_
