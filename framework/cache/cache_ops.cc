#include "framework/cache/cache_ops.h"

#include <cstring>

#include "framework/base/error.h"

namespace sikv {
namespace {

constexpr int kPageTokens = SIKV_PAGE_TOKENS;

const char* row_address(const sikv_rows& rows, int sequence, int token, int head) {
  const int64_t element =
      (rows.first[sequence] + int64_t{token}) * rows.token_stride + head * rows.head_stride;
  return static_cast<const char*>(rows.data) + element * sikv_dtype_bytes(rows.dtype);
}

uint32_t nibble(const uint8_t* tile, int group, int token) {
  return tile[group * 4 + token / 2] >> (token % 2 * 4) & 0xf;
}

void set_nibble(uint8_t* tile, int group, int token, uint32_t code) {
  uint8_t& byte = tile[group * 4 + token / 2];
  const int shift = token % 2 * 4;
  byte = static_cast<uint8_t>((byte & ~(0xf << shift)) | (code << shift));
}

size_t row_bytes(const sikv_cache_view& view) {
  return static_cast<size_t>(view.head_dim) * static_cast<size_t>(sikv_dtype_bytes(view.dtype));
}

// The tail is written through the view's const pointers, which plugins get.
char* tail_token(const sikv_cache_view& view, const void* tail, int sequence, int token) {
  const int64_t at = int64_t{sequence} * view.tail_capacity + token;
  return static_cast<char*>(const_cast<void*>(tail)) +
         at * view.num_kv_heads * static_cast<int64_t>(row_bytes(view));
}

class CpuCacheOps final : public CacheOps {
 public:
  void append(const LayerArrays& layer, const void* k, const void* v) override {
    const sikv_cache_view& view = layer.view;
    const size_t bytes = row_bytes(view) * static_cast<size_t>(view.num_kv_heads);
    for (int b = 0; b < view.num_sequences; ++b) {
      const size_t from = static_cast<size_t>(b) * bytes;
      const int at = layer.tail_len[b];
      std::memcpy(tail_token(view, view.tail_k, b, at), static_cast<const char*>(k) + from, bytes);
      std::memcpy(tail_token(view, view.tail_v, b, at), static_cast<const char*>(v) + from, bytes);
    }
  }

  void fill_tails(const LayerArrays& layer, const sikv_rows& k, const sikv_rows& v) override {
    const sikv_cache_view& view = layer.view;
    const size_t bytes = row_bytes(view);
    for (int b = 0; b < view.num_sequences; ++b) {
      const int done = k.count[b] / kPageTokens * kPageTokens;
      for (int t = done; t < k.count[b]; ++t) {
        for (int h = 0; h < view.num_kv_heads; ++h) {
          const size_t at = static_cast<size_t>(h) * bytes;
          std::memcpy(tail_token(view, view.tail_k, b, t - done) + at, row_address(k, b, t, h),
                      bytes);
          std::memcpy(tail_token(view, view.tail_v, b, t - done) + at, row_address(v, b, t, h),
                      bytes);
        }
      }
    }
  }

  void copy_pins(const LayerArrays& layer, const sikv_rows& k, const sikv_rows& v) override {
    const sikv_cache_view& view = layer.view;
    const size_t bytes = row_bytes(view);
    for (int row = 0; row < view.num_sequences * view.num_kv_heads; ++row) {
      const int b = row / view.num_kv_heads, h = row % view.num_kv_heads;
      for (int i = 0; i < view.pinned_len[row]; ++i) {
        const int64_t pin = int64_t{row} * view.pinned_capacity + i;
        const int32_t slot = view.pinned_slots[pin];
        const auto copy = [&](const void* to, const sikv_rows& from) {
          std::memcpy(static_cast<char*>(const_cast<void*>(to)) + pin * static_cast<int64_t>(bytes),
                      row_address(from, b, slot, h), bytes);
        };
        copy(view.pinned_k, k);
        copy(view.pinned_v, v);
      }
    }
  }

  void move_tokens(const LayerArrays& layer, int row, std::span<const int32_t> keep) override {
    for (const sikv_store_view* store : {&layer.view.key, &layer.view.value}) {
      for (uint32_t p = 0; p < store->layout->num_planes; ++p) {
        move_plane(layer.view, *store, p, row, keep);
      }
    }
  }

  void begin_flush(const LayerArrays&, const FlushArrays&) override {}
  void end_flush(const LayerArrays&, const FlushArrays&) override {}
  void count_attended(const LayerArrays&, const int32_t*, uint64_t*) override {}

 private:
  static void move_plane(const sikv_cache_view& view, const sikv_store_view& store, uint32_t p,
                         int row, std::span<const int32_t> keep) {
    const sikv_plane& plane = store.layout->planes[p];
    const int tile = static_cast<int>(plane.tile_tokens);
    const size_t bytes = plane.bytes_per_tile;
    const size_t stride = sikv_tile_stride(store.layout, p);
    // A tile's bytes in its page; ascending keep-lists never overwrite what is still to be read.
    const auto tile_of = [&](int slot) {
      const int64_t page = view.page_table[int64_t{row} * view.max_pages + slot / kPageTokens];
      return static_cast<uint8_t*>(store.planes[p]) + page * store.page_stride_bytes[p] +
             static_cast<size_t>(slot % kPageTokens / tile) * stride;
    };
    for (int to = 0; to < static_cast<int>(keep.size()); ++to) {
      const int from = keep[static_cast<size_t>(to)];
      if (from == to) continue;
      switch (plane.organisation) {
        case SIKV_PER_TOKEN:
        case SIKV_IN_LINE:
          std::memmove(tile_of(to), tile_of(from), bytes);
          break;
        case SIKV_NIBBLE_TILES:
          for (int g = 0; g < static_cast<int>(bytes / 4); ++g) {
            set_nibble(tile_of(to), g, to % 8, nibble(tile_of(from), g, from % 8));
          }
          break;
        default:
          if (to % tile == 0) std::memmove(tile_of(to), tile_of(from), bytes);
      }
    }
  }
};

}  // namespace

std::unique_ptr<CacheOps> make_cache_ops(Device& device) {
  if (device.is_cuda()) return make_cuda_cache_ops(device);
  return std::make_unique<CpuCacheOps>();
}

}  // namespace sikv
