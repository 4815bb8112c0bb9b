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
#include <memory>
#include <span>
#include <vector>

#include "framework/cache/cache_ops.h"
#include "framework/cache/ledger.h"
#include "framework/cache/mirrored_array.h"
#include "framework/cache/page_pool.h"
#include "framework/device/device.h"
#include "plugins/abi/sikv_codec.h"

namespace sikv {

struct CacheOptions {
  int pinned_capacity = 64;  // exact copies per row
  int tail_capacity = SIKV_PAGE_TOKENS;
  bool evicts = true;  // tokens may go and leave pages part-filled: a row then takes more of them
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
  // Added to it by the first eviction: from which position each slot came.
  static uint64_t position_bytes(const sikv_shape& shape);

  KvCache(Device& device, const sikv_shape& shape, Store key, Store value, CacheOptions options);

  // What plugins see of one layer. Pointers stay valid until the next call that changes the cache.
  // On a GPU max_encoded_len is encoded_bound.
  sikv_cache_view view(int layer) const;
  // The same with host addresses of page table, lengths, positions and pinned slots. On the CPU
  // there is no difference.
  sikv_cache_view host_view(int layer) const;

  const sikv_shape& shape() const { return shape_; }
  int num_rows() const { return shape_.max_sequences * shape_.num_kv_heads; }
  int encoded_len(int layer, int row) const;
  int tail_len(int layer, int sequence) const;
  int tail_capacity() const { return options_.tail_capacity; }

  // Gives row `row` the pages for `tokens` more encoded tokens and returns its first free slot;
  // the tokens count as encoded from here on.
  int32_t extend(int layer, int row, int tokens);

  // k, v [B, H, D] on the device: one token to the end of every sequence's tail, which must have
  // room.
  void append(int layer, const void* k, const void* v);
  // The tails begin with what of the prompts fills no page. Rows are the device's, `counts` [B] are
  // the prompts' lengths once more, on the host. Error where a row was not extended by their whole
  // pages.
  void fill_tails(int layer, const sikv_rows& k, const sikv_rows& v, const int32_t* counts);

  // Tails that hold a whole page are flushed: reserve_flush, begin_flush, encode, end_flush.
  bool flush_due(int layer) const;
  // Takes the pages.
  void reserve_flush(int layer);
  // The tokens to encode, which count as encoded from here on; arrays are the device's.
  struct Flush {
    sikv_rows k, v;
    const int32_t* first_slot;
  };
  Flush begin_flush(int layer);
  void end_flush(int layer);
  // On a GPU: adds what a selection attends to to sums [3] there (CacheOps).
  void count_attended(int layer, const int32_t* counts, uint64_t* sums) {
    ops_->count_attended(arrays(layer), counts, sums);
  }

  // Pins `slots` (ascending) of a row; copy_pins then keeps exact copies of all rows' pinned slots:
  // slot s was prompt row s of k and v (device rows).
  void pin(int layer, int row, std::span<const int32_t> slots);
  void copy_pins(int layer, const sikv_rows& k, const sikv_rows& v);
  // Where kernels write the pinned slots they choose; pins_chosen takes them over.
  struct PinArrays {
    int32_t* slots;  // device; [B, H, pinned_capacity]
    int32_t* len;    // device; [B, H]
  };
  PinArrays pin_arrays(int layer);
  void pins_chosen(int layer);

  // Keeps only `keep` (ascending) and pinned slots of a row: tokens move together, pages behind
  // them go back to the pool. Error if a plane shares bytes between tokens that part.
  void evict(int layer, int row, std::span<const int32_t> keep);

  // ---- GPU ----
  // A length that every row's encoded_len stays at or below for a while; steps that are launched
  // for it can be replayed until it changes. After a flush of what is due now where `flush`.
  int encoded_bound(int layer, bool flush) const;
  // From here on calls enqueue work that is being recorded, not done: the host's counts stay.
  // `bounds` [layers] replaces encoded_bound. Everything edited must have been uploaded.
  void begin_recording(std::span<const int> bounds);
  void end_recording();
  // The host's share of one recorded step that was replayed: flush, if there was one, and append.
  void replayed(int layer, bool flush);
  // Brings the device's copies up to date.
  void upload() const;
  // What kernels found wrong first; `what` is 0 if nothing. Waits for them.
  sikv_fault fault() const;

  // After evictions: what no page in use needs goes back to the system (on the CPU).
  void trim() {
    if (pool_.trim()) device_.trim();
  }

  // Forgets a sequence in every layer.
  void clear(int sequence);

  // Bytes of pages in use by role, side tables, tail, pinned, page tables.
  Ledger ledger() const;
  // Bytes of all planes of the pages in use per encoded token and KV head; 0 while nothing is.
  // Evicted tokens count too, so that evicting lowers it.
  double bytes_per_token() const;
  // The same by the tokens that are left.
  double bytes_per_stored_token() const;
  int64_t pages_in_use() const { return pool_.in_use(); }

 private:
  struct Layer {
    MirroredArray page_table;         // [B, H, max_pages]
    MirroredArray encoded_len;        // [B, H]
    MirroredArray positions;          // [B, H, max_pages * 256], empty until something is evicted
    MirroredArray next_position;      // [B, H] of the next encoded token; evicted ones count too
    MirroredArray tail_len;           // [B]
    MirroredArray pinned_slots;       // [B, H, pinned_capacity]
    MirroredArray pinned_len;         // [B, H]
    DeviceBuffer tail_k, tail_v;      // [B, tail_capacity, H, D]
    DeviceBuffer pinned_k, pinned_v;  // [B, H, pinned_capacity, D]
    std::vector<DeviceBuffer> key_tables, value_tables;  // [B, H, count] fp32 each
  };

  Layer& at(int layer) { return layers_[static_cast<size_t>(layer)]; }
  const Layer& at(int layer) const { return layers_[static_cast<size_t>(layer)]; }
  int pages_of(int layer, int row) const;
  void take_pages(int layer, int row, int tokens);
  int longest(int layer, bool flush) const;
  LayerArrays arrays(int layer);
  void note_append(int layer);
  void note_begin_flush(int layer);
  void note_end_flush(int layer);
  const sikv_plane& plane(int i) const;
  int num_planes() const;
  // Bytes of the planes of one page by role, then what lines leave unused.
  Ledger page_bytes() const;
  // Bytes of all pages in use by what `counts` holds of all rows.
  double page_bytes_by(MirroredArray Layer::*counts) const;

  Device& device_;
  sikv_shape shape_;
  Store key_, value_;
  CacheOptions options_;
  int max_pages_;
  PagePool pool_;
  std::unique_ptr<CacheOps> ops_;
  std::vector<Layer> layers_;
  MirroredArray flush_first_, flush_count_, flush_slots_;  // [B], [B], [B, H] of Flush
  DeviceBuffer fault_;                                     // sikv_fault, on a GPU
  bool recording_ = false;
  std::vector<int> recording_bounds_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CACHE_KV_CACHE_H_
