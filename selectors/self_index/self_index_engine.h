// What a variant computes for one row, free of state; everything around it is shared.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_ENGINE_H_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "plugins/sdk/plugin.h"
#include "selectors/self_index/self_index.h"
#include "selectors/self_index/self_index_tables.h"

namespace sikv::self_index {

// Carves arrays, 64-byte aligned, out of one block. Made from null it only counts: constructing a
// scratch struct with it answers how many bytes that struct needs.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}

  template <typename T>
  T* take(int64_t n) {
    const size_t offset = used_;
    used_ += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

// Upper bounds that size the scratch of one worker.
struct Limits {
  int head_dim;
  int group;           // G
  int64_t tokens;      // encoded tokens of a row
  int64_t scanned;     // candidates of one scan
  int64_t candidates;  // of one scan and the pages encoded since
};

// Copies of candidates' keys, side by side, in the form of the engine that made them. Empty where
// that engine ranks candidates where they lie.
struct PackedKeys {
  int bits = 0, head_dim = 0;
  int64_t count = 0;            // candidates
  std::vector<uint32_t> words;  // [count, words of a candidate]
  std::vector<float> scales;    // [count]

  uint64_t bytes() const {
    return words.capacity() * sizeof(uint32_t) + scales.capacity() * sizeof(float);
  }
};

// Slots to rank: unpinned, ascending; the first packed.count of them are also in `packed`.
struct Candidates {
  std::span<const int32_t> slots;
  const PackedKeys& packed;
};

// The queries of one row at one step.
struct RowQuery {
  const CacheView& view;
  int row;
  int group;           // G
  float scale;         // of the logits
  const float* heads;  // [G, D]
  const float* mean;   // [D] of the G heads
};

// A query of the prompt, and the exact keys before it.
struct PromptQuery {
  const RowsView& keys;
  int sequence;
  int head;
  int head_dim;
  int group;
  float scale;
  const float* heads;  // [G, D]
};

// Thread safe; `scratch` is one worker's, of scratch_bytes and 64-byte aligned.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual size_t scratch_bytes(const Limits& limits) const = 0;

  // Writes the `count` unpinned encoded slots with the highest index scores, or all if there are
  // fewer, ascending, and returns how many. Ties at the cut go to the lower slot.
  virtual int64_t scan(const CacheView& view, int row, const IndexTables& tables, int64_t count,
                       std::byte* scratch, int32_t* slots) const = 0;

  // Packs the keys of `slots` for a pool that serves several steps.
  virtual void pack(const CacheView& view, int row, std::span<const int32_t> slots,
                    PackedKeys& packed) const {
    static_cast<void>(view), static_cast<void>(row), static_cast<void>(slots);
    packed.count = 0;
  }

  // Writes the `budget` most probable of more than `budget` candidates, ascending. The probability
  // is the mean over the G heads of a softmax over the candidates with their decoded keys and over
  // pinned tokens and tail with their exact ones.
  virtual void rerank(const RowQuery& query, const Candidates& candidates, int64_t budget,
                      std::byte* scratch, int32_t* kept) const = 0;

  // probability [count] = mean over the G heads of the exact softmax over the prompt's first
  // `count` tokens. `count` is at most Limits::tokens.
  virtual void attend_prompt(const PromptQuery& query, int64_t count, std::byte* scratch,
                             float* probability) const = 0;
};

// The selector around an engine.
std::unique_ptr<Selector> make_selector(const CreateArgs& args, const Config& config,
                                        std::unique_ptr<Engine> engine);

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_ENGINE_H_
