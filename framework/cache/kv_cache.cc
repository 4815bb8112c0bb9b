#include "framework/cache/kv_cache.h"

#include <algorithm>
#include <numeric>

#include "framework/base/error.h"

namespace sikv {
namespace {

constexpr int kPageTokens = SIKV_PAGE_TOKENS;

int pages_for(int64_t tokens) { return static_cast<int>((tokens + kPageTokens - 1) / kPageTokens); }

// Of the pool's planes: those of the layouts in order, without the ones in lines; then the lines.
std::vector<uint64_t> plane_sizes(const sikv_layout& key, const sikv_layout& value) {
  SIKV_ASSERT(line_conflict(key, value).empty());
  std::vector<uint64_t> sizes;
  for (const sikv_layout* layout : {&key, &value}) {
    for (uint32_t i = 0; i < layout->num_planes; ++i) {
      if (layout->planes[i].organisation == SIKV_IN_LINE) continue;
      sizes.push_back(plane_page_bytes(layout->planes[i]));
    }
  }
  if (key.line_bytes > 0) sizes.push_back(uint64_t{SIKV_PAGE_TOKENS} * key.line_bytes);
  return sizes;
}

// One page more than the length needs: an eviction may leave a part-filled page behind.
int max_pages(const sikv_shape& shape) { return pages_for(shape.max_tokens) + 1; }

// What is not evicted lies in full pages.
int pool_pages(const sikv_shape& shape, const CacheOptions& options) {
  return options.evicts ? max_pages(shape) : std::max(shape.max_tokens / kPageTokens, 1);
}

// Bounds of encoded lengths step by an eighth of the length, and at least by this: a recorded step
// then serves thousands of tokens and few of its blocks find nothing to do.
constexpr int kLeastBoundStep = 4096;

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
            int64_t{pool_pages(shape, options)} * shape.num_layers * shape.max_sequences *
                shape.num_kv_heads),
      ops_(make_cache_ops(device)) {
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
    layer.page_table = MirroredArray(device, rows * static_cast<size_t>(max_pages_), -1);
    layer.encoded_len = MirroredArray(device, rows, 0);
    layer.next_position = MirroredArray(device, rows, 0);
    layer.tail_len = MirroredArray(device, static_cast<size_t>(shape.max_sequences), 0);
    layer.pinned_slots =
        MirroredArray(device, rows * static_cast<size_t>(options.pinned_capacity), 0);
    layer.pinned_len = MirroredArray(device, rows, 0);
    layer.tail_k = DeviceBuffer(device, tail_bytes);
    layer.tail_v = DeviceBuffer(device, tail_bytes);
    layer.pinned_k = DeviceBuffer(device, pinned_bytes);
    layer.pinned_v = DeviceBuffer(device, pinned_bytes);
    layer.key_tables = tables(key.layout);
    layer.value_tables = tables(value.layout);
  }
  flush_first_ = MirroredArray(device, static_cast<size_t>(shape.max_sequences), 0);
  for (int b = 0; b < shape.max_sequences; ++b) {
    flush_first_.edit(static_cast<size_t>(b)) = b * options.tail_capacity;
  }
  flush_count_ = MirroredArray(device, static_cast<size_t>(shape.max_sequences), 0);
  flush_slots_ = MirroredArray(device, rows, 0);
  if (device.is_cuda()) fault_ = DeviceBuffer(device, sizeof(sikv_fault));
}

uint64_t KvCache::page_table_bytes(const sikv_shape& shape, const CacheOptions& options) {
  const uint64_t rows = static_cast<uint64_t>(shape.max_sequences * shape.num_kv_heads);
  const uint64_t per_row = static_cast<uint64_t>(max_pages(shape)) +         // page_table
                           static_cast<uint64_t>(options.pinned_capacity) +  // pinned_slots
                           3;  // encoded_len, next_position, pinned_len
  const uint64_t tails = static_cast<uint64_t>(shape.max_sequences);
  return static_cast<uint64_t>(shape.num_layers) * (rows * per_row + tails) * sizeof(int32_t);
}

uint64_t KvCache::position_bytes(const sikv_shape& shape) {
  return static_cast<uint64_t>(shape.num_layers) *
         static_cast<uint64_t>(shape.max_sequences * shape.num_kv_heads) *
         static_cast<uint64_t>(max_pages(shape)) * SIKV_PAGE_TOKENS * sizeof(int32_t);
}

sikv_cache_view KvCache::view(int index) const {
  const Layer& layer = at(index);
  sikv_cache_view view = host_view(index);
  if (recording_) {
    view.max_encoded_len = recording_bounds_[static_cast<size_t>(index)];
  } else if (device_.is_cuda()) {
    view.max_encoded_len = encoded_bound(index, false);
  }
  view.page_table = layer.page_table.device();
  view.encoded_len = layer.encoded_len.device();
  view.positions = layer.positions.empty() ? nullptr : layer.positions.device();
  view.tail_len = layer.tail_len.device();
  view.pinned_slots = layer.pinned_slots.device();
  view.pinned_len = layer.pinned_len.device();
  return view;
}

sikv_cache_view KvCache::host_view(int index) const {
  const Layer& layer = at(index);
  sikv_cache_view view{};
  view.struct_size = sizeof view;
  view.layer = index;
  view.num_sequences = shape_.max_sequences;
  view.num_kv_heads = shape_.num_kv_heads;
  view.head_dim = shape_.head_dim;
  view.dtype = shape_.dtype;
  view.max_pages = max_pages_;
  view.max_encoded_len = longest(index, false);
  view.page_table = layer.page_table.host();
  view.encoded_len = layer.encoded_len.host();
  view.positions = layer.positions.empty() ? nullptr : layer.positions.host();
  int plane = 0;
  const auto fill = [&](sikv_store_view& to, const Store& from,
                        const std::vector<DeviceBuffer>& tables) {
    to.layout = &from.layout;
    to.codec = from.codec;
    to.codec_self = from.codec_self;
    for (uint32_t i = 0; i < from.layout.num_planes; ++i) {
      const bool in_line = from.layout.planes[i].organisation == SIKV_IN_LINE;
      const int place = in_line ? pool_.num_planes() - 1 : plane++;
      to.planes[i] =
          static_cast<uint8_t*>(pool_.plane(place)) + (in_line ? from.layout.line_offset[i] : 0);
      to.page_stride_bytes[i] = static_cast<int64_t>(pool_.page_bytes(place));
    }
    for (size_t i = 0; i < tables.size(); ++i) to.tables[i] = tables[i].as<float>();
  };
  fill(view.key, key_, layer.key_tables);
  fill(view.value, value_, layer.value_tables);
  view.tail_capacity = options_.tail_capacity;
  view.pinned_capacity = options_.pinned_capacity;
  view.tail_k = layer.tail_k.as<>();
  view.tail_v = layer.tail_v.as<>();
  view.tail_len = layer.tail_len.host();
  view.pinned_k = layer.pinned_k.as<>();
  view.pinned_v = layer.pinned_v.as<>();
  view.pinned_slots = layer.pinned_slots.host();
  view.pinned_len = layer.pinned_len.host();
  view.fault = fault_.as<sikv_fault>();
  return view;
}

LayerArrays KvCache::arrays(int index) {
  const Layer& layer = at(index);
  return {view(index), layer.encoded_len.device(), layer.next_position.device(),
          layer.positions.empty() ? nullptr : layer.positions.device(), layer.tail_len.device()};
}

// The most encoded tokens of a row; where `flush`, with the page that its tail is about to become.
int KvCache::longest(int index, bool flush) const {
  const Layer& layer = at(index);
  int most = 0;
  for (int row = 0; row < num_rows(); ++row) {
    const bool due = flush && tail_len(index, row / shape_.num_kv_heads) == kPageTokens;
    most = std::max(most, layer.encoded_len[static_cast<size_t>(row)] + (due ? kPageTokens : 0));
  }
  return most;
}

int KvCache::encoded_bound(int layer, bool flush) const {
  const int64_t length = longest(layer, flush);
  int64_t step = kLeastBoundStep;
  while (step * 16 <= length) step *= 2;
  const int64_t bound = (length + step - 1) / step * step;
  return static_cast<int>(std::min<int64_t>(bound, shape_.max_tokens));
}

int KvCache::encoded_len(int layer, int row) const {
  return at(layer).encoded_len[static_cast<size_t>(row)];
}

int KvCache::tail_len(int layer, int sequence) const {
  return at(layer).tail_len[static_cast<size_t>(sequence)];
}

int KvCache::pages_of(int layer, int row) const { return pages_for(encoded_len(layer, row)); }

void KvCache::take_pages(int index, int row, int tokens) {
  const int64_t length = int64_t{encoded_len(index, row)} + tokens;
  if (length > shape_.max_tokens) {
    throw Error(
        "sequence {} of the batch would hold {} tokens, but the cache was planned for max_tokens "
        "{}: raise it or shorten the run",
        row / shape_.num_kv_heads, length, shape_.max_tokens);
  }
  for (int p = pages_of(index, row); p < pages_for(length); ++p) {
    at(index).page_table.edit(static_cast<size_t>(row) * static_cast<size_t>(max_pages_) +
                              static_cast<size_t>(p)) = pool_.take();
  }
}

int32_t KvCache::extend(int index, int row, int tokens) {
  Layer& layer = at(index);
  const size_t r = static_cast<size_t>(row);
  const int32_t first = layer.encoded_len[r];
  take_pages(index, row, tokens);
  if (!layer.positions.empty()) {
    const size_t at = r * static_cast<size_t>(max_pages_ * kPageTokens);
    const auto count = static_cast<size_t>(tokens);
    int32_t* positions = layer.positions.edit(at + static_cast<size_t>(first), count);
    std::iota(positions, positions + tokens, layer.next_position[r]);
  }
  layer.next_position.edit(r) += tokens;
  layer.encoded_len.edit(r) = first + tokens;
  return first;
}

void KvCache::append(int layer, const void* k, const void* v) {
  if (!recording_) {
    for (int b = 0; b < shape_.max_sequences; ++b) {
      SIKV_ASSERT(tail_len(layer, b) < options_.tail_capacity);
    }
  }
  for (const void* data : {k, v}) {
    if (!device_.is_cuda() || reinterpret_cast<uintptr_t>(data) % 16 == 0) continue;
    throw Error("K or V of a decode step lies at {}, which is no multiple of 16 bytes: align it",
                data);
  }
  ops_->append(arrays(layer), k, v);
  if (!recording_) note_append(layer);
}

void KvCache::note_append(int layer) {
  int32_t* const tail_len = at(layer).tail_len.follow();
  for (int b = 0; b < shape_.max_sequences; ++b) ++tail_len[b];
}

void KvCache::fill_tails(int layer, const sikv_rows& k, const sikv_rows& v, const int32_t* counts) {
  for (int row = 0; row < num_rows(); ++row) {
    const int32_t count = counts[row / shape_.num_kv_heads];
    if (encoded_len(layer, row) == count / kPageTokens * kPageTokens) continue;
    throw Error(
        "the prompt of sequence {} has {} tokens, but layer {}, KV head {} has pages for {} where "
        "its whole pages are {}: extend every row by exactly those",
        row / shape_.num_kv_heads, count, layer, row % shape_.num_kv_heads, encoded_len(layer, row),
        count / kPageTokens * kPageTokens);
  }
  ops_->fill_tails(arrays(layer), k, v);
  for (int b = 0; b < shape_.max_sequences; ++b) {
    at(layer).tail_len.edit(static_cast<size_t>(b)) = counts[b] % kPageTokens;
  }
}

bool KvCache::flush_due(int layer) const {
  for (int b = 0; b < shape_.max_sequences; ++b) {
    if (tail_len(layer, b) == kPageTokens) return true;
  }
  return false;
}

void KvCache::reserve_flush(int layer) {
  for (int row = 0; row < num_rows(); ++row) {
    if (tail_len(layer, row / shape_.num_kv_heads) == kPageTokens) {
      take_pages(layer, row, kPageTokens);
    }
  }
}

KvCache::Flush KvCache::begin_flush(int index) {
  const FlushArrays arrays{flush_count_.device(), flush_slots_.device()};
  ops_->begin_flush(this->arrays(index), arrays);
  if (!recording_) note_begin_flush(index);
  const auto rows = [&](const DeviceBuffer& data) {
    return sikv_rows{data.as<>(),    shape_.dtype,
                     kPageTokens,    flush_first_.device(),
                     arrays.count,   int64_t{shape_.num_kv_heads} * shape_.head_dim,
                     shape_.head_dim};
  };
  return {rows(at(index).tail_k), rows(at(index).tail_v), arrays.first_slot};
}

void KvCache::note_begin_flush(int index) {
  Layer& layer = at(index);
  for (int row = 0; row < num_rows(); ++row) {
    const int b = row / shape_.num_kv_heads;
    const int count = tail_len(index, b) == kPageTokens ? kPageTokens : 0;
    flush_count_.follow()[b] = count;
    const int32_t first = layer.encoded_len[static_cast<size_t>(row)];
    flush_slots_.follow()[row] = first;
    int32_t& next = layer.next_position.follow()[row];
    if (!layer.positions.empty()) {
      int32_t* const positions =
          layer.positions.follow() + int64_t{row} * max_pages_ * kPageTokens + first;
      std::iota(positions, positions + count, next);
    }
    next += count;
    layer.encoded_len.follow()[row] = first + count;
  }
}

void KvCache::end_flush(int layer) {
  ops_->end_flush(arrays(layer), {flush_count_.device(), flush_slots_.device()});
  if (!recording_) note_end_flush(layer);
}

void KvCache::note_end_flush(int layer) {
  int32_t* const tail_len = at(layer).tail_len.follow();
  for (int b = 0; b < shape_.max_sequences; ++b) {
    if (tail_len[b] == kPageTokens) tail_len[b] = 0;
  }
}

void KvCache::begin_recording(std::span<const int> bounds) {
  recording_ = true;
  recording_bounds_.assign(bounds.begin(), bounds.end());
}

void KvCache::end_recording() { recording_ = false; }

void KvCache::replayed(int layer, bool flush) {
  if (flush) {
    note_begin_flush(layer);
    note_end_flush(layer);
  }
  note_append(layer);
}

void KvCache::upload() const {
  for (int l = 0; l < shape_.num_layers; ++l) {
    static_cast<void>(view(l));
    static_cast<void>(at(l).next_position.device());
  }
  for (const MirroredArray* array : {&flush_first_, &flush_count_, &flush_slots_}) {
    static_cast<void>(array->device());
  }
}

sikv_fault KvCache::fault() const {
  sikv_fault fault{};
  if (fault_.bytes() > 0) device_.copy_out(&fault, fault_.as<>(), sizeof fault);
  return fault;
}

void KvCache::pin(int index, int row, std::span<const int32_t> slots) {
  Layer& layer = at(index);
  SIKV_ASSERT(static_cast<int>(slots.size()) <= options_.pinned_capacity);
  const size_t base = static_cast<size_t>(row) * static_cast<size_t>(options_.pinned_capacity);
  std::copy(slots.begin(), slots.end(), layer.pinned_slots.edit(base, slots.size()));
  layer.pinned_len.edit(static_cast<size_t>(row)) = static_cast<int32_t>(slots.size());
}

void KvCache::copy_pins(int layer, const sikv_rows& k, const sikv_rows& v) {
  ops_->copy_pins(arrays(layer), k, v);
}

KvCache::PinArrays KvCache::pin_arrays(int layer) {
  return {at(layer).pinned_slots.device(), at(layer).pinned_len.device()};
}

void KvCache::pins_chosen(int layer) {
  at(layer).pinned_slots.pull();
  at(layer).pinned_len.pull();
}

int KvCache::num_planes() const {
  return static_cast<int>(key_.layout.num_planes + value_.layout.num_planes);
}

const sikv_plane& KvCache::plane(int i) const {
  const int keys = static_cast<int>(key_.layout.num_planes);
  return i < keys ? key_.layout.planes[i] : value_.layout.planes[i - keys];
}

void KvCache::evict(int index, int row, std::span<const int32_t> wanted) {
  Layer& layer = at(index);
  const size_t pinned_base =
      static_cast<size_t>(row) * static_cast<size_t>(options_.pinned_capacity);
  const auto num_pinned = static_cast<size_t>(layer.pinned_len[static_cast<size_t>(row)]);
  const std::span pinned(layer.pinned_slots.host() + pinned_base, num_pinned);
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
            "them: use a codec with scales per token, or a selector that keeps whole pages, as "
            "streaming does",
            layout_text(p < static_cast<int>(key_.layout.num_planes) ? key_.layout : value_.layout),
            tile);
      }
    }
  }

  const size_t table_size = static_cast<size_t>(num_rows()) * static_cast<size_t>(max_pages_);
  const size_t row_slots = static_cast<size_t>(max_pages_) * kPageTokens;
  if (layer.positions.empty()) {
    layer.positions = MirroredArray(device_, table_size * kPageTokens, 0);
    for (size_t r = 0; r < static_cast<size_t>(num_rows()); ++r) {
      int32_t* const row_positions = layer.positions.edit(r * row_slots, row_slots);
      std::iota(row_positions, row_positions + row_slots, 0);
    }
  }
  ops_->move_tokens(arrays(index), row, keep);
  const size_t first_position = static_cast<size_t>(row) * row_slots;
  int32_t* positions = layer.positions.edit(first_position, static_cast<size_t>(encoded));
  for (size_t i = 0; i < keep.size(); ++i) positions[i] = positions[keep[i]];
  for (int32_t& slot : std::span(layer.pinned_slots.edit(pinned_base, num_pinned), num_pinned)) {
    slot = static_cast<int32_t>(std::lower_bound(keep.begin(), keep.end(), slot) - keep.begin());
  }
  const int before = pages_of(index, row);
  layer.encoded_len.edit(static_cast<size_t>(row)) = static_cast<int32_t>(keep.size());
  for (int p = pages_of(index, row); p < before; ++p) {
    int32_t& number = layer.page_table.edit(
        static_cast<size_t>(row) * static_cast<size_t>(max_pages_) + static_cast<size_t>(p));
    pool_.give_back(number);
    number = -1;
  }
}

void KvCache::clear(int sequence) {
  for (Layer& layer : layers_) {
    for (int h = 0; h < shape_.num_kv_heads; ++h) {
      const size_t row = static_cast<size_t>(sequence * shape_.num_kv_heads + h);
      for (size_t p = 0; p < static_cast<size_t>(max_pages_); ++p) {
        int32_t& number = layer.page_table.edit(row * static_cast<size_t>(max_pages_) + p);
        if (number >= 0) pool_.give_back(number);
        number = -1;
      }
      layer.encoded_len.edit(row) = layer.next_position.edit(row) = 0;
      layer.pinned_len.edit(row) = 0;
    }
    layer.tail_len.edit(static_cast<size_t>(sequence)) = 0;
  }
}

Ledger KvCache::page_bytes() const {
  Ledger page;
  for (int p = 0; p < num_planes(); ++p) {
    page.add(role_name(plane(p).role), plane_page_bytes(plane(p)));
  }
  page.add(kLinePadding, line_padding_page_bytes(key_.layout, value_.layout));
  return page;
}

Ledger KvCache::ledger() const {
  Ledger ledger;
  const Ledger page = page_bytes();
  for (const LedgerLine& line : page.lines()) {
    ledger.add(line.role, line.bytes * static_cast<uint64_t>(pool_.in_use()));
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

double KvCache::bytes_per_token() const { return page_bytes_by(&Layer::next_position); }

double KvCache::bytes_per_stored_token() const { return page_bytes_by(&Layer::encoded_len); }

double KvCache::page_bytes_by(MirroredArray Layer::*counts) const {
  uint64_t tokens = 0;
  for (const Layer& layer : layers_) {
    const MirroredArray& rows = layer.*counts;
    tokens = std::accumulate(rows.host(), rows.host() + rows.size(), tokens);
  }
  const uint64_t bytes = page_bytes().total() * static_cast<uint64_t>(pool_.in_use());
  return tokens == 0 ? 0.0 : static_cast<double>(bytes) / static_cast<double>(tokens);
}

}  // namespace sikv
