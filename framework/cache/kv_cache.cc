#include "framework/cache/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "framework/base/error.h"

namespace sikv {
namespace {

constexpr int kPageTokens = SIKV_PAGE_TOKENS;

int pages_for(int64_t tokens) { return static_cast<int>((tokens + kPageTokens - 1) / kPageTokens); }

std::vector<uint64_t> plane_sizes(const sikv_layout& key, const sikv_layout& value) {
  std::vector<uint64_t> sizes;
  for (const sikv_layout* layout : {&key, &value}) {
    for (uint32_t i = 0; i < layout->num_planes; ++i) {
      sizes.push_back(plane_page_bytes(layout->planes[i]));
    }
  }
  return sizes;
}

// One page more than the length needs: an eviction may leave a part-filled page behind.
int max_pages(const sikv_shape& shape) { return pages_for(shape.max_tokens) + 1; }

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

}  // namespace

KvCache::KvCache(Device& device, const sikv_shape& shape, Store key, Store value,
                 CacheOptions options)
    : device_(device),
      shape_(shape),
      key_(key),
      value_(value),
      options_(options),
      max_pages_(max_pages(shape)),
      pool_(device, plane_sizes(key.layout, value.layout),
            int64_t{max_pages_} * shape.num_layers * shape.max_sequences * shape.num_kv_heads) {
  const size_t rows = static_cast<size_t>(num_rows());
  const size_t row_bytes =
      static_cast<size_t>(shape.head_dim) * static_cast<size_t>(sikv_dtype_bytes(shape.dtype));
  const size_t tail_bytes = rows * static_cast<size_t>(options.tail_capacity) * row_bytes;
  const size_t pinned_bytes = rows * static_cast<size_t>(options.pinned_capacity) * row_bytes;
  const auto tables = [&](const sikv_layout& layout) {
    std::vector<DeviceBuffer> buffers;
    for (uint32_t i = 0; i < layout.num_tables; ++i) {
      buffers.emplace_back(device, rows * layout.tables[i].count * sizeof(float));
    }
    return buffers;
  };
  for (int l = 0; l < shape.num_layers; ++l) {
    Layer& layer = layers_.emplace_back();
    layer.page_table.assign(rows * static_cast<size_t>(max_pages_), -1);
    layer.encoded_len.assign(rows, 0);
    layer.next_position.assign(rows, 0);
    layer.tail_len.assign(static_cast<size_t>(shape.max_sequences), 0);
    layer.pinned_slots.assign(rows * static_cast<size_t>(options.pinned_capacity), 0);
    layer.pinned_len.assign(rows, 0);
    layer.tail_k = DeviceBuffer(device, tail_bytes);
    layer.tail_v = DeviceBuffer(device, tail_bytes);
    layer.pinned_k = DeviceBuffer(device, pinned_bytes);
    layer.pinned_v = DeviceBuffer(device, pinned_bytes);
    layer.key_tables = tables(key.layout);
    layer.value_tables = tables(value.layout);
  }
}

uint64_t KvCache::page_table_bytes(const sikv_shape& shape, const CacheOptions& options) {
  const uint64_t rows = static_cast<uint64_t>(shape.max_sequences * shape.num_kv_heads);
  const uint64_t per_row = static_cast<uint64_t>(max_pages(shape)) +         // page_table
                           static_cast<uint64_t>(options.pinned_capacity) +  // pinned_slots
                           3;  // encoded_len, next_position, pinned_len
  const uint64_t tails = static_cast<uint64_t>(shape.max_sequences);
  return static_cast<uint64_t>(shape.num_layers) * (rows * per_row + tails) * sizeof(int32_t);
}

sikv_cache_view KvCache::view(int index) const {
  const Layer& layer = layers_[static_cast<size_t>(index)];
  sikv_cache_view view{};
  view.struct_size = sizeof view;
  view.layer = index;
  view.num_sequences = shape_.max_sequences;
  view.num_kv_heads = shape_.num_kv_heads;
  view.head_dim = shape_.head_dim;
  view.dtype = shape_.dtype;
  view.max_pages = max_pages_;
  view.max_encoded_len = *std::max_element(layer.encoded_len.begin(), layer.encoded_len.end());
  view.page_table = layer.page_table.data();
  view.encoded_len = layer.encoded_len.data();
  view.positions = layer.positions.empty() ? nullptr : layer.positions.data();
  int plane = 0;
  const auto fill = [&](sikv_store_view& to, const Store& from,
                        const std::vector<DeviceBuffer>& tables) {
    to.layout = &from.layout;
    to.codec = from.codec;
    to.codec_self = from.codec_self;
    for (uint32_t i = 0; i < from.layout.num_planes; ++i, ++plane) {
      to.planes[i] = pool_.plane(plane);
      to.page_stride_bytes[i] = static_cast<int64_t>(pool_.page_bytes(plane));
    }
    for (size_t i = 0; i < tables.size(); ++i) to.tables[i] = tables[i].as<float>();
  };
  fill(view.key, key_, layer.key_tables);
  fill(view.value, value_, layer.value_tables);
  view.tail_capacity = options_.tail_capacity;
  view.pinned_capacity = options_.pinned_capacity;
  view.tail_k = layer.tail_k.as<>();
  view.tail_v = layer.tail_v.as<>();
  view.tail_len = layer.tail_len.data();
  view.pinned_k = layer.pinned_k.as<>();
  view.pinned_v = layer.pinned_v.as<>();
  view.pinned_slots = layer.pinned_slots.data();
  view.pinned_len = layer.pinned_len.data();
  return view;
}

int KvCache::encoded_len(int layer, int row) const {
  return layers_[static_cast<size_t>(layer)].encoded_len[static_cast<size_t>(row)];
}

int KvCache::tail_len(int layer, int sequence) const {
  return layers_[static_cast<size_t>(layer)].tail_len[static_cast<size_t>(sequence)];
}

int KvCache::pages_of(int layer, int row) const { return pages_for(encoded_len(layer, row)); }

int32_t KvCache::extend(int index, int row, int tokens) {
  Layer& layer = layers_[static_cast<size_t>(index)];
  const int32_t first = layer.encoded_len[static_cast<size_t>(row)];
  const int have = pages_of(index, row), need = pages_for(int64_t{first} + tokens);
  if (int64_t{first} + tokens > shape_.max_tokens) {
    throw Error(
        "sequence {} of the batch would hold {} tokens, but the cache was planned for max_tokens "
        "{}: raise it or shorten the run",
        row / shape_.num_kv_heads, first + tokens, shape_.max_tokens);
  }
  for (int p = have; p < need; ++p) {
    layer.page_table[static_cast<size_t>(row) * static_cast<size_t>(max_pages_) +
                     static_cast<size_t>(p)] = pool_.take();
  }
  int32_t& next = layer.next_position[static_cast<size_t>(row)];
  if (!layer.positions.empty()) {
    int32_t* positions = layer.positions.data() + int64_t{row} * max_pages_ * kPageTokens;
    std::iota(positions + first, positions + first + tokens, next);
  }
  next += tokens;
  layer.encoded_len[static_cast<size_t>(row)] = first + tokens;
  return first;
}

void KvCache::push_tail(int index, int sequence, const void* k, const void* v) {
  Layer& layer = layers_[static_cast<size_t>(index)];
  int32_t& len = layer.tail_len[static_cast<size_t>(sequence)];
  SIKV_ASSERT(len < options_.tail_capacity);
  const size_t bytes = static_cast<size_t>(shape_.num_kv_heads) *
                       static_cast<size_t>(shape_.head_dim) *
                       static_cast<size_t>(sikv_dtype_bytes(shape_.dtype));
  const size_t at = (static_cast<size_t>(sequence) * static_cast<size_t>(options_.tail_capacity) +
                     static_cast<size_t>(len)) *
                    bytes;
  device_.copy_in(layer.tail_k.as<char>() + at, k, bytes);
  device_.copy_in(layer.tail_v.as<char>() + at, v, bytes);
  ++len;
}

void KvCache::fill_tail(int layer, int sequence, const sikv_rows& k, const sikv_rows& v, int from,
                        int count) {
  const size_t row_bytes =
      static_cast<size_t>(shape_.head_dim) * static_cast<size_t>(sikv_dtype_bytes(shape_.dtype));
  std::vector<char> token_k(row_bytes * static_cast<size_t>(shape_.num_kv_heads)), token_v(token_k);
  for (int t = from; t < from + count; ++t) {
    for (int h = 0; h < shape_.num_kv_heads; ++h) {
      const size_t at = static_cast<size_t>(h) * row_bytes;
      std::memcpy(token_k.data() + at, row_address(k, sequence, t, h), row_bytes);
      std::memcpy(token_v.data() + at, row_address(v, sequence, t, h), row_bytes);
    }
    push_tail(layer, sequence, token_k.data(), token_v.data());
  }
}

void KvCache::clear_tail(int layer, int sequence) {
  layers_[static_cast<size_t>(layer)].tail_len[static_cast<size_t>(sequence)] = 0;
}

KvCache::TailRows KvCache::tail_rows(int index, const std::vector<bool>& due, int count) const {
  const Layer& layer = layers_[static_cast<size_t>(index)];
  TailRows rows;
  for (int b = 0; b < shape_.max_sequences; ++b) {
    rows.first.push_back(b * options_.tail_capacity);
    rows.count.push_back(due[static_cast<size_t>(b)] ? count : 0);
  }
  const auto make = [&](const DeviceBuffer& data) {
    return sikv_rows{
        data.as<>(),       shape_.dtype,      count,
        rows.first.data(), rows.count.data(), int64_t{shape_.num_kv_heads} * shape_.head_dim,
        shape_.head_dim};
  };
  rows.k = make(layer.tail_k);
  rows.v = make(layer.tail_v);
  return rows;
}

void KvCache::pin(int index, int row, std::span<const int32_t> slots, const sikv_rows& k,
                  const sikv_rows& v) {
  Layer& layer = layers_[static_cast<size_t>(index)];
  SIKV_ASSERT(static_cast<int>(slots.size()) <= options_.pinned_capacity);
  const size_t row_bytes =
      static_cast<size_t>(shape_.head_dim) * static_cast<size_t>(sikv_dtype_bytes(shape_.dtype));
  const int b = row / shape_.num_kv_heads, h = row % shape_.num_kv_heads;
  const size_t base = static_cast<size_t>(row) * static_cast<size_t>(options_.pinned_capacity);
  for (size_t i = 0; i < slots.size(); ++i) {
    layer.pinned_slots[base + i] = slots[i];
    device_.copy_in(layer.pinned_k.as<char>() + (base + i) * row_bytes,
                    row_address(k, b, slots[i], h), row_bytes);
    device_.copy_in(layer.pinned_v.as<char>() + (base + i) * row_bytes,
                    row_address(v, b, slots[i], h), row_bytes);
  }
  layer.pinned_len[static_cast<size_t>(row)] = static_cast<int32_t>(slots.size());
}

int KvCache::num_planes() const {
  return static_cast<int>(key_.layout.num_planes + value_.layout.num_planes);
}

const sikv_plane& KvCache::plane(int i) const {
  const int keys = static_cast<int>(key_.layout.num_planes);
  return i < keys ? key_.layout.planes[i] : value_.layout.planes[i - keys];
}

uint8_t* KvCache::page(int layer, int row, int slot, int plane) const {
  const int64_t entry = int64_t{row} * max_pages_ + slot / kPageTokens;
  const int32_t number = layers_[static_cast<size_t>(layer)].page_table[static_cast<size_t>(entry)];
  return static_cast<uint8_t*>(pool_.plane(plane)) +
         static_cast<uint64_t>(number) * pool_.page_bytes(plane);
}

void KvCache::move_tokens(int layer, int row, std::span<const int32_t> keep) {
  for (int p = 0; p < num_planes(); ++p) {
    const sikv_plane& plane = this->plane(p);
    const int tile = static_cast<int>(plane.tile_tokens);
    const size_t bytes = plane.bytes_per_tile;
    // A tile's bytes in its page; ascending keep-lists never overwrite what is still to be read.
    const auto tile_of = [&](int slot) {
      return page(layer, row, slot, p) + static_cast<size_t>(slot % kPageTokens / tile) * bytes;
    };
    for (int to = 0; to < static_cast<int>(keep.size()); ++to) {
      const int from = keep[static_cast<size_t>(to)];
      if (from == to) continue;
      switch (plane.organisation) {
        case SIKV_PER_TOKEN:
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
}

void KvCache::evict(int index, int row, std::span<const int32_t> wanted) {
  Layer& layer = layers_[static_cast<size_t>(index)];
  const size_t pinned_base =
      static_cast<size_t>(row) * static_cast<size_t>(options_.pinned_capacity);
  const std::span<int32_t> pinned(layer.pinned_slots.data() + pinned_base,
                                  static_cast<size_t>(layer.pinned_len[static_cast<size_t>(row)]));
  std::vector<int32_t> keep;
  std::set_union(wanted.begin(), wanted.end(), pinned.begin(), pinned.end(),
                 std::back_inserter(keep));
  const int encoded = encoded_len(index, row);
  SIKV_ASSERT(keep.empty() || (keep.front() >= 0 && keep.back() < encoded));
  for (int p = 0; p < num_planes(); ++p) {
    if (plane(p).organisation != SIKV_SHARED) continue;
    const int tile = static_cast<int>(plane(p).tile_tokens);
    const size_t whole = keep.size() / static_cast<size_t>(tile) * static_cast<size_t>(tile);
    for (size_t i = 0; i < keep.size(); ++i) {
      const bool together = i < whole && keep[i] % tile == static_cast<int>(i) % tile &&
                            (i % static_cast<size_t>(tile) == 0 || keep[i] == keep[i - 1] + 1);
      if (!together) {
        throw Error(
            "layout {} shares its scales among {} tokens, and the selector keeps only some of "
            "them: let it evict whole groups (pinned: 0), or use a codec with scales per token",
            layout_text(p < static_cast<int>(key_.layout.num_planes) ? key_.layout : value_.layout),
            tile);
      }
    }
  }

  const size_t table_size = static_cast<size_t>(num_rows()) * static_cast<size_t>(max_pages_);
  if (layer.positions.empty()) {
    layer.positions.resize(table_size * kPageTokens);
    for (int r = 0; r < num_rows(); ++r) {
      int32_t* row_positions = layer.positions.data() + int64_t{r} * max_pages_ * kPageTokens;
      std::iota(row_positions, row_positions + int64_t{max_pages_} * kPageTokens, 0);
    }
  }
  move_tokens(index, row, keep);
  int32_t* positions = layer.positions.data() + int64_t{row} * max_pages_ * kPageTokens;
  for (size_t i = 0; i < keep.size(); ++i) positions[i] = positions[keep[i]];
  for (int32_t& slot : pinned) {
    slot = static_cast<int32_t>(std::lower_bound(keep.begin(), keep.end(), slot) - keep.begin());
  }
  const int before = pages_of(index, row);
  layer.encoded_len[static_cast<size_t>(row)] = static_cast<int32_t>(keep.size());
  for (int p = pages_of(index, row); p < before; ++p) {
    int32_t& number = layer.page_table[static_cast<size_t>(row) * static_cast<size_t>(max_pages_) +
                                       static_cast<size_t>(p)];
    pool_.give_back(number);
    number = -1;
  }
}

void KvCache::clear(int sequence) {
  for (Layer& layer : layers_) {
    for (int h = 0; h < shape_.num_kv_heads; ++h) {
      const size_t row = static_cast<size_t>(sequence * shape_.num_kv_heads + h);
      for (size_t p = 0; p < static_cast<size_t>(max_pages_); ++p) {
        int32_t& number = layer.page_table[row * static_cast<size_t>(max_pages_) + p];
        if (number >= 0) pool_.give_back(number);
        number = -1;
      }
      layer.encoded_len[row] = layer.next_position[row] = 0;
      layer.pinned_len[row] = 0;
    }
    layer.tail_len[static_cast<size_t>(sequence)] = 0;
  }
}

Ledger KvCache::ledger() const {
  Ledger ledger;
  for (int p = 0; p < num_planes(); ++p) {
    ledger.add(role_name(plane(p).role),
               pool_.page_bytes(p) * static_cast<uint64_t>(pool_.in_use()));
  }
  for (const Layer& layer : layers_) {
    for (const auto* tables : {&layer.key_tables, &layer.value_tables}) {
      for (const DeviceBuffer& table : *tables) ledger.add("side_tables", table.bytes());
    }
    ledger.add("tail", layer.tail_k.bytes() + layer.tail_v.bytes());
    ledger.add("pinned", layer.pinned_k.bytes() + layer.pinned_v.bytes());
    ledger.add("page_tables",
               (layer.page_table.size() + layer.encoded_len.size() + layer.positions.size() +
                layer.next_position.size() + layer.tail_len.size() + layer.pinned_slots.size() +
                layer.pinned_len.size()) *
                   sizeof(int32_t));
  }
  return ledger;
}

double KvCache::bytes_per_token() const {
  uint64_t tokens = 0, bytes = 0;
  for (const Layer& layer : layers_) {
    tokens = std::accumulate(layer.encoded_len.begin(), layer.encoded_len.end(), tokens);
  }
  for (int p = 0; p < num_planes(); ++p) {
    bytes += pool_.page_bytes(p) * static_cast<uint64_t>(pool_.in_use());
  }
  return tokens == 0 ? 0.0 : static_cast<double>(bytes) / static_cast<double>(tokens);
}

}  // namespace sikv
