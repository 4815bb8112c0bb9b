// Attention of one decode step on the CPU, generic over how encoded tokens are read: one softmax
// per query head over encoded tokens, pinned copies and tail.
//
// A row's encoded tokens are cut into splits that run in parallel, each into a FlashState per query
// head; the states are then merged, brought back to the space of K and V, and pinned and tail
// tokens are added exactly.
#ifndef SIKV_KERNELS_COMMON_FLASH_ROWS_H_
#define SIKV_KERNELS_COMMON_FLASH_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/flash_state.h"
#include "plugins/sdk/plugin.h"

namespace sikv {

inline float dot(const float* a, const float* b, int n) {
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Which encoded tokens a kernel visits.
enum class Encoded {
  kSelected,  // the selection; pinned tokens come from their exact copies
  kAll,       // every one where it lies, pinned ones too
};

// A reader of tokens that are stored in the space K and V came in. A reader also has
//   void load(int row, std::span<const int32_t> slots, float* k, float* v) const
// that writes k, v [slots.size(), D].
struct PlainReader {
  // Turns q [G, D] into the space of the loaded keys. shift [G], zero at the call: what is then
  // missing from q.k of every encoded token alike.
  void prepare(int /*row*/, float* /*q*/, float* /*shift*/) const {}
  // Brings acc [D], a sum of loaded values whose weights add up to `sum`, back.
  void restore(int /*row*/, float /*sum*/, float* /*acc*/) const {}
};

class FlashRows {
 public:
  explicit FlashRows(const CreateArgs& args)
      : host_(args.host),
        group_(args.group()),
        dim_(args.shape.head_dim),
        rows_(args.shape.max_sequences * args.shape.num_kv_heads),
        workers_(args.device.num_threads) {}

  uint64_t workspace_bytes() const {
    return sizeof(float) *
           static_cast<uint64_t>(int64_t{rows_} * kMaxSplits * group_ * FlashState::floats(dim_) +
                                 workers_ * Scratch::floats(group_, dim_));
  }

  template <typename Reader>
  void run(const sikv_attend_args& args, const CacheView& view, void* workspace, Encoded encoded,
           const Reader& reader) const {
    auto* const states = static_cast<float*>(workspace);
    float* const scratch = states + int64_t{rows_} * kMaxSplits * group_ * FlashState::floats(dim_);
    const QueryView queries(args.q, view, args.num_query_heads);
    const auto state = [&](int row, int split, int g) {
      const int64_t index = (int64_t{row} * kMaxSplits + split) * group_ + g;
      return FlashState(states + index * FlashState::floats(dim_), dim_);
    };

    parallel_for(host_, int64_t{view.num_rows()} * kMaxSplits, [&](int64_t i, int32_t worker) {
      const int row = static_cast<int>(i / kMaxSplits), split = static_cast<int>(i % kMaxSplits);
      const Tokens tokens(view, args.selection, row, encoded);
      if (split >= tokens.splits()) return;
      const Scratch local(scratch + worker * Scratch::floats(group_, dim_), group_, dim_);
      queries.load_group(row, local.q);
      std::fill_n(local.shift, group_, 0.0f);
      reader.prepare(row, local.q, local.shift);
      for (int g = 0; g < group_; ++g) state(row, split, g).reset();
      tokens.for_each_chunk(split, [&](std::span<const int32_t> slots, int64_t at) {
        reader.load(row, slots, local.k, local.v);
        for (int t = 0; t < static_cast<int>(slots.size()); ++t) {
          for (int g = 0; g < group_; ++g) {
            float logit = args.scale * dot(local.q + g * dim_, local.k + t * dim_, dim_);
            if (args.log_weights != nullptr && tokens.listed()) {
              const int64_t head = queries.first_head(row) + g;
              logit += args.log_weights[head * args.selection.capacity + at + t];
            }
            state(row, split, g).add(logit, local.v + t * dim_);
          }
        }
      });
    });

    parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t worker) {
      const int row = static_cast<int>(i);
      const Tokens tokens(view, args.selection, row, encoded);
      const Scratch local(scratch + worker * Scratch::floats(group_, dim_), group_, dim_);
      queries.load_group(row, local.q);
      std::fill_n(local.shift, group_, 0.0f);
      reader.prepare(row, local.q, local.shift);
      for (int g = 0; g < group_; ++g) {
        FlashState total = state(row, 0, g);
        for (int split = 1; split < tokens.splits(); ++split) total.merge(state(row, split, g));
        if (total.empty()) continue;  // and the row's side tables may never have been filled
        total.shift_logits(args.scale * local.shift[g]);
        reader.restore(row, total.sum(), total.acc());
      }

      queries.load_group(row, local.q);
      const auto add_exact = [&] {
        for (int g = 0; g < group_; ++g) {
          state(row, 0, g).add(args.scale * dot(local.q + g * dim_, local.k, dim_), local.v);
        }
      };
      if (encoded == Encoded::kSelected) {
        for (int p = 0; p < static_cast<int>(view.pinned_slots(row).size()); ++p) {
          view.load_pinned_k(row, p, local.k);
          view.load_pinned_v(row, p, local.v);
          add_exact();
        }
      }
      for (int t = 0; t < view.tail_len(row / view.num_kv_heads()); ++t) {
        view.load_tail_k(row, t, local.k);
        view.load_tail_v(row, t, local.v);
        add_exact();
      }
      for (int g = 0; g < group_; ++g) {
        const int64_t head = queries.first_head(row) + g;
        args.lse[head] = state(row, 0, g).finish(args.out + head * dim_);
      }
    });
  }

 private:
  // Enough splits to keep the cores busy with one row; a split is long against its merge (D + 2
  // floats per query head).
  static constexpr int kMaxSplits = 16;
  static constexpr int kSplitTokens = 512;
  // Tokens decoded at a time: K and V of a chunk, 128 KB at D = 256, stay in L2.
  static constexpr int kChunkTokens = 64;

  // One worker's.
  struct Scratch {
    static int64_t floats(int group, int dim) {
      return int64_t{group} * dim + group + int64_t{2} * kChunkTokens * dim;
    }
    Scratch(float* base, int group, int dim)
        : q(base), shift(q + group * dim), k(shift + group), v(k + kChunkTokens * dim) {}
    float* q;      // [G, D]
    float* shift;  // [G]
    float* k;      // [kChunkTokens, D]
    float* v;      // [kChunkTokens, D]
  };

  // The encoded tokens of one row that are visited, cut into splits.
  class Tokens {
   public:
    Tokens(const CacheView& view, const sikv_selection& selection, int row, Encoded encoded)
        : skip_(view.pinned_slots(row)) {
      if (encoded == Encoded::kAll) skip_ = {};
      if (encoded == Encoded::kAll || SelectionRow(selection, row).all()) {
        count_ = view.encoded_len(row);
      } else {
        listed_ = SelectionRow(selection, row).slots();
        count_ = std::ssize(listed_);
      }
    }

    int splits() const {
      const int64_t wanted = (count_ + kSplitTokens - 1) / kSplitTokens;
      return static_cast<int>(std::clamp<int64_t>(wanted, 1, kMaxSplits));
    }

    bool listed() const { return !listed_.empty(); }

    // visit(slots, place of the first of them in the list, if they are listed).
    template <typename Visit>
    void for_each_chunk(int split, Visit&& visit) const {
      int32_t slots[kChunkTokens];
      size_t filled = 0;
      int64_t at = count_ * split / splits();
      for (int64_t i = count_ * split / splits(); i < count_ * (split + 1) / splits(); ++i) {
        const int32_t slot = listed() ? listed_[static_cast<size_t>(i)] : static_cast<int32_t>(i);
        if (!listed() && std::binary_search(skip_.begin(), skip_.end(), slot)) continue;
        slots[filled++] = slot;
        if (filled == kChunkTokens) {
          visit(std::span<const int32_t>(slots, filled), at);
          at += static_cast<int64_t>(filled);
          filled = 0;
        }
      }
      if (filled > 0) visit(std::span<const int32_t>(slots, filled), at);
    }

   private:
    std::span<const int32_t> skip_;    // ascending; left out where nothing is listed
    std::span<const int32_t> listed_;  // empty: slots 0 .. count - 1
    int64_t count_;
  };

  const sikv_host& host_;
  int group_, dim_, rows_, workers_;
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_FLASH_ROWS_H_
