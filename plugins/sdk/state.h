// For selectors that keep something of every key: state per (layer, row), and the newly encoded
// rows that feed it.
#ifndef SIKV_PLUGINS_SDK_STATE_H_
#define SIKV_PLUGINS_SDK_STATE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "plugins/abi/sikv_selector.h"
#include "plugins/sdk/view.h"

namespace sikv {

// One T for each (layer, sequence, KV head).
template <typename T>
class RowState {
 public:
  explicit RowState(const sikv_shape& shape)
      : heads_(shape.num_kv_heads),
        rows_(shape.max_sequences * shape.num_kv_heads),
        state_(static_cast<size_t>(shape.num_layers) * static_cast<size_t>(rows_)) {}

  T& at(int layer, int row) { return state_[place(layer, row)]; }
  const T& at(int layer, int row) const { return state_[place(layer, row)]; }
  // Drops what all layers hold of a sequence.
  void reset(int sequence) {
    for (size_t first = static_cast<size_t>(sequence) * static_cast<size_t>(heads_);
         first < state_.size(); first += static_cast<size_t>(rows_)) {
      // Moved, so that memory goes, too.
      for (size_t h = 0; h < static_cast<size_t>(heads_); ++h) state_[first + h] = T();
    }
  }
  auto begin() const { return state_.begin(); }
  auto end() const { return state_.end(); }

 private:
  size_t place(int layer, int row) const {
    return static_cast<size_t>(layer) * static_cast<size_t>(rows_) + static_cast<size_t>(row);
  }

  int heads_, rows_;
  std::vector<T> state_;
};

// Tokens of one row that have just been encoded: row t of the exact keys, t in [0, count), has
// position first_position + t.
struct NewTokens {
  int row, sequence, head;
  int first_position, count;
};

// Of a prompt: the tokens that went into pages, from position 0; the tail comes in a page later.
inline std::vector<NewTokens> newly_encoded(const sikv_observe_args& args, const CacheView& view) {
  std::vector<NewTokens> rows;
  const RowsView keys(args.keys);
  for (int row = 0; row < view.num_rows(); ++row) {
    const int b = row / view.num_kv_heads(), h = row % view.num_kv_heads();
    const int count = std::min(keys.count(b), view.encoded_len(row));
    if (count > 0) rows.push_back({row, b, h, 0, count});
  }
  return rows;
}

// Of the sequences that got a page.
inline std::vector<NewTokens> newly_encoded(const sikv_observe_page_args& args,
                                            const CacheView& view) {
  std::vector<NewTokens> rows;
  const RowsView keys(args.keys);
  for (int row = 0; row < view.num_rows(); ++row) {
    const int b = row / view.num_kv_heads(), h = row % view.num_kv_heads();
    if (keys.count(b) == 0) continue;
    rows.push_back({row, b, h, view.position(row, args.first_slot[row]), keys.count(b)});
  }
  return rows;
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_STATE_H_
