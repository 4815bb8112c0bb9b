// Typed readings of the structs that cross the boundary: rows, layouts, the cache.
//
// Shapes: B sequences, H KV heads, G query heads per KV head, D head_dim. row = b * H + h.
#ifndef SIKV_PLUGINS_SDK_VIEW_H_
#define SIKV_PLUGINS_SDK_VIEW_H_

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>

#include "plugins/abi/sikv_abi.h"
#include "plugins/abi/sikv_codec.h"
#include "plugins/sdk/error.h"

namespace sikv {

inline constexpr int kPageTokens = SIKV_PAGE_TOKENS;

// Reads `n` consecutive elements as fp32.
inline void load_floats(const void* data, int32_t dtype, int64_t offset, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = sikv_load(data, dtype, offset + i);
}

// ---- rows of K or V ---------------------------------------------------------------------------

class RowsView {
 public:
  explicit RowsView(const sikv_rows& rows) : rows_(rows) {}

  int count(int sequence) const { return rows_.count[sequence]; }
  int32_t dtype() const { return rows_.dtype; }
  const sikv_rows& raw() const { return rows_; }
  int64_t offset(int sequence, int token, int head) const {
    return (rows_.first[sequence] + int64_t{token}) * rows_.token_stride + head * rows_.head_stride;
  }
  // out [D] = row `token` of (sequence, head) as fp32.
  void load(int sequence, int token, int head, int head_dim, float* out) const {
    load_floats(rows_.data, rows_.dtype, offset(sequence, token, head), head_dim, out);
  }
  const void* address(int sequence, int token, int head) const {
    return static_cast<const char*>(rows_.data) +
           offset(sequence, token, head) * sikv_dtype_bytes(rows_.dtype);
  }

 private:
  sikv_rows rows_;
};

// ---- layouts ------------------------------------------------------------------------------------

class LayoutView {
 public:
  explicit LayoutView(const sikv_layout& layout) : layout_(&layout) {}

  std::string_view family() const { return layout_->family; }
  int version() const { return static_cast<int>(layout_->version); }
  int head_dim() const { return static_cast<int>(layout_->head_dim); }
  const sikv_layout& raw() const { return *layout_; }
  bool is(std::string_view family, int version) const {
    return this->family() == family && this->version() == version;
  }

  // Value of a parameter of the family; a layout without it is a bug of the codec.
  std::string_view param(std::string_view name) const {
    for (uint32_t i = 0; i < layout_->num_params; ++i) {
      if (name == layout_->params[i].name) return layout_->params[i].value;
    }
    throw PluginBug("layout " + std::string(family()) + " has no parameter '" + std::string(name) +
                    "'");
  }
  int int_param(std::string_view name) const { return std::atoi(param(name).data()); }

  // Index of the plane with this role, or -1.
  int plane(sikv_role role) const {
    for (uint32_t i = 0; i < layout_->num_planes; ++i) {
      if (layout_->planes[i].role == static_cast<uint32_t>(role)) return static_cast<int>(i);
    }
    return -1;
  }
  // Bytes from one tile to the next in a plane.
  int tile_stride(int plane) const {
    return static_cast<int>(sikv_tile_stride(layout_, static_cast<uint32_t>(plane)));
  }
  // Index of the side table with this role, or -1.
  int table(sikv_table_role role) const {
    for (uint32_t i = 0; i < layout_->num_tables; ++i) {
      if (layout_->tables[i].role == static_cast<uint32_t>(role)) return static_cast<int>(i);
    }
    return -1;
  }

 private:
  const sikv_layout* layout_;
};

// Builds the layout a codec describes.
class LayoutBuilder {
 public:
  LayoutBuilder(std::string_view family, int version, int head_dim) {
    layout_.struct_size = sizeof layout_;
    layout_.version = static_cast<uint32_t>(version);
    layout_.head_dim = static_cast<uint32_t>(head_dim);
    copy(layout_.family, sizeof layout_.family, family);
  }
  LayoutBuilder& param(std::string_view name, std::string_view value) {
    if (layout_.num_params == SIKV_MAX_PARAMS) throw PluginBug("too many layout parameters");
    sikv_layout_param& param = layout_.params[layout_.num_params++];
    copy(param.name, sizeof param.name, name);
    copy(param.value, sizeof param.value, value);
    return *this;
  }
  LayoutBuilder& param(std::string_view name, int value) {
    return param(name, std::to_string(value));
  }
  LayoutBuilder& plane(sikv_role role, sikv_organisation organisation, int tile_tokens,
                       int bytes_per_tile) {
    if (layout_.num_planes == SIKV_MAX_PLANES) throw PluginBug("too many planes");
    layout_.planes[layout_.num_planes++] = {
        static_cast<uint32_t>(role), static_cast<uint32_t>(organisation),
        static_cast<uint32_t>(tile_tokens), static_cast<uint32_t>(bytes_per_tile)};
    return *this;
  }
  // Bytes [offset, offset + bytes) of a token's line, whose size all of a layout's planes agree on.
  LayoutBuilder& in_line(sikv_role role, int line_bytes, int offset, int bytes) {
    const auto line = static_cast<uint32_t>(line_bytes);
    if (layout_.line_bytes != 0 && layout_.line_bytes != line) {
      throw PluginBug("planes of one layout in lines of " + std::to_string(layout_.line_bytes) +
                      " and of " + std::to_string(line) + " bytes");
    }
    layout_.line_bytes = line;
    plane(role, SIKV_IN_LINE, 1, bytes);
    layout_.line_offset[layout_.num_planes - 1] = static_cast<uint32_t>(offset);
    return *this;
  }
  LayoutBuilder& table(sikv_table_role role, int count) {
    if (layout_.num_tables == SIKV_MAX_TABLES) throw PluginBug("too many side tables");
    layout_.tables[layout_.num_tables++] = {static_cast<uint32_t>(role),
                                            static_cast<uint32_t>(count)};
    return *this;
  }
  const sikv_layout& build() const { return layout_; }

 private:
  static void copy(char* to, size_t size, std::string_view from) {
    if (from.size() >= size) throw PluginBug("layout name too long: " + std::string(from));
    from.copy(to, from.size());
  }
  sikv_layout layout_{};
};

// ---- the cache ----------------------------------------------------------------------------------

// The keys or the values of one layer, by plane role.
class StoreView {
 public:
  StoreView(const sikv_cache_view& view, const sikv_store_view& store)
      : view_(&view), store_(&store), layout_(*store.layout) {}

  const LayoutView& layout() const { return layout_; }

  // First byte of a page of the plane with `role`: page number `page` of row's page table.
  uint8_t* page(sikv_role role, int row, int page) const {
    const int plane = layout_.plane(role);
    if (plane < 0) throw PluginBug("the layout lacks a plane that its codec or reader needs");
    const int64_t number = view_->page_table[int64_t{row} * view_->max_pages + page];
    return static_cast<uint8_t*>(store_->planes[plane]) + number * store_->page_stride_bytes[plane];
  }
  // A side table of one row.
  float* table(sikv_table_role role, int row) const {
    const int table = layout_.table(role);
    if (table < 0) throw PluginBug("the layout lacks a side table that its codec or reader needs");
    return store_->tables[table] + int64_t{row} * store_->layout->tables[table].count;
  }

  // out [slots.size(), D] = the slots of one row as fp32, decoded by the store's own codec.
  void decode(int row, std::span<const int32_t> slots, float* out) const {
    const int32_t count = static_cast<int32_t>(slots.size());
    if (count == 0) return;
    const sikv_decode_args args{view_, row, 1, count, 0, slots.data(), &count, out};
    sdk::checked([&](sikv_message* why) {
      return store_->codec->decode(store_->codec_self, &args, nullptr, why);
    });
  }

 private:
  const sikv_cache_view* view_;
  const sikv_store_view* store_;
  LayoutView layout_;
};

// One layer of the cache, host-readable.
class CacheView {
 public:
  explicit CacheView(const sikv_cache_view& view)
      : view_(view), key_(view_, view_.key), value_(view_, view_.value) {}
  CacheView(const CacheView&) = delete;
  CacheView& operator=(const CacheView&) = delete;

  int layer() const { return view_.layer; }
  int num_sequences() const { return view_.num_sequences; }
  int num_kv_heads() const { return view_.num_kv_heads; }
  int head_dim() const { return view_.head_dim; }
  int num_rows() const { return view_.num_sequences * view_.num_kv_heads; }
  int32_t dtype() const { return view_.dtype; }
  const sikv_cache_view& raw() const { return view_; }

  const StoreView& key() const { return key_; }
  const StoreView& value() const { return value_; }

  int encoded_len(int row) const { return view_.encoded_len[row]; }
  int tail_len(int sequence) const { return view_.tail_len[sequence]; }
  // Position in the sequence of an encoded slot.
  int position(int row, int slot) const {
    return view_.positions == nullptr
               ? slot
               : view_.positions[int64_t{row} * view_.max_pages * kPageTokens + slot];
  }
  // Tokens a (sequence, KV head) holds: encoded and tail.
  int length(int row) const { return encoded_len(row) + tail_len(row / num_kv_heads()); }

  // Ascending slots of a row's pinned tokens.
  std::span<const int32_t> pinned_slots(int row) const {
    return {view_.pinned_slots + int64_t{row} * view_.pinned_capacity,
            static_cast<size_t>(view_.pinned_len[row])};
  }
  void load_pinned_k(int row, int i, float* out) const { load_pinned(view_.pinned_k, row, i, out); }
  void load_pinned_v(int row, int i, float* out) const { load_pinned(view_.pinned_v, row, i, out); }
  void load_tail_k(int row, int i, float* out) const { load_tail(view_.tail_k, row, i, out); }
  void load_tail_v(int row, int i, float* out) const { load_tail(view_.tail_v, row, i, out); }

 private:
  void load_pinned(const void* data, int row, int i, float* out) const {
    const int64_t offset = (int64_t{row} * view_.pinned_capacity + i) * head_dim();
    load_floats(data, view_.dtype, offset, head_dim(), out);
  }
  void load_tail(const void* data, int row, int i, float* out) const {
    const int b = row / num_kv_heads(), h = row % num_kv_heads();
    const int64_t token = int64_t{b} * view_.tail_capacity + i;
    load_floats(data, view_.dtype, (token * num_kv_heads() + h) * head_dim(), head_dim(), out);
  }

  sikv_cache_view view_;
  StoreView key_, value_;
};

// The query heads of one decode step, q [B, Hq, D].
class QueryView {
 public:
  QueryView(const void* q, const CacheView& view, int num_query_heads)
      : q_(q),
        dtype_(view.dtype()),
        head_dim_(view.head_dim()),
        heads_(num_query_heads),
        group_(num_query_heads / view.num_kv_heads()),
        kv_heads_(view.num_kv_heads()) {}

  int group() const { return group_; }
  // out [G, D] = the query heads that share the KV head of `row`.
  void load_group(int row, float* out) const {
    const int b = row / kv_heads_, h = row % kv_heads_;
    load_floats(q_, dtype_, (int64_t{b} * heads_ + int64_t{h} * group_) * head_dim_,
                group_ * head_dim_, out);
  }
  // First query head of a row in [B, Hq] order.
  int64_t first_head(int row) const {
    return int64_t{row / kv_heads_} * heads_ + int64_t{row % kv_heads_} * group_;
  }

 private:
  const void* q_;
  int32_t dtype_;
  int head_dim_, heads_, group_, kv_heads_;
};

// The selection of one row, to write or to read.
class SelectionRow {
 public:
  SelectionRow(const sikv_selection& selection, int row)
      : slots_(selection.slots + int64_t{row} * selection.capacity),
        count_(selection.counts + row),
        capacity_(selection.capacity) {}

  bool all() const { return *count_ == SIKV_SELECT_ALL; }
  void select_all() { *count_ = SIKV_SELECT_ALL; }
  void clear() { *count_ = 0; }
  void push(int32_t slot) {
    if (*count_ >= capacity_) throw PluginBug("a selection grew past its planned capacity");
    slots_[(*count_)++] = slot;
  }
  std::span<const int32_t> slots() const { return {slots_, static_cast<size_t>(*count_)}; }
  std::span<int32_t> storage() const { return {slots_, static_cast<size_t>(capacity_)}; }
  void set_count(int32_t count) { *count_ = count; }

 private:
  int32_t* slots_;
  int32_t* count_;
  int32_t capacity_;
};

// Calls visit(slot) for slots 0 .. n - 1 without those in `pinned` (ascending).
template <typename Visit>
void for_each_unpinned(int n, std::span<const int32_t> pinned, Visit&& visit) {
  size_t next = 0;
  for (int32_t slot = 0; slot < n; ++slot) {
    if (next < pinned.size() && pinned[next] == slot) {
      ++next;
    } else {
      visit(slot);
    }
  }
}

// Calls visit(slot) for every slot of a row that attention adds to pinned and tail, ascending.
template <typename Visit>
void for_each_selected(const CacheView& view, const SelectionRow& selection, int row,
                       Visit&& visit) {
  if (selection.all()) {
    for_each_unpinned(view.encoded_len(row), view.pinned_slots(row), visit);
  } else {
    for (int32_t slot : selection.slots()) visit(slot);
  }
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_VIEW_H_
