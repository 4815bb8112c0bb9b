#include "kernels/common/key_selector.h"
#include "plugins/sdk/scan_cost.h"
#include "selectors/hisa/hisa.h"

namespace sikv::hisa {
namespace {

struct State {
  std::vector<float> sums;  // [blocks, D] of the keys of each block
  int64_t count = 0;

  int64_t tokens() const { return count; }
  uint64_t bytes() const { return sums.size() * sizeof(float); }
};

void pooled(const float* rows, int64_t count, int head_dim, const float* q, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = 0.0f;
    for (int d = 0; d < head_dim; ++d) out[i] += q[d] * rows[i * head_dim + d];
  }
}

void stored(const CacheView& view, int row, std::span<const int32_t> slots, const float* q,
            float* out) {
  std::vector<float> keys(slots.size() * static_cast<size_t>(view.head_dim()));
  view.key().decode(row, slots, keys.data());
  pooled(keys.data(), std::ssize(slots), view.head_dim(), q, out);
}

class Hisa : public KeySelector<State> {
 public:
  Hisa(const CreateArgs& args, const RowMath& math, const LevelMath& levels)
      : KeySelector(args, math, 0),
        levels_(levels),
        block_tokens_(args.options.integer("block_tokens")),
        blocks_(args.options.integer("blocks")) {}

 protected:
  void add(const float* keys, int count, int64_t first, State& state) override {
    const int dim = shape().head_dim;
    state.count = std::max(state.count, first + count);
    state.sums.resize(static_cast<size_t>(blocks(state.count) * dim));
    for (int t = 0; t < count; ++t) {
      float* sum = state.sums.data() + (first + t) / block_tokens_ * dim;
      for (int d = 0; d < dim; ++d) sum[d] += keys[t * dim + d];
    }
  }

  // Scores of tokens outside of the chosen blocks are -inf.
  int score(const RowQuery& query, const State& state, float* logits, int64_t) override {
    const CacheView& view = query.view;
    const int row = query.row, dim = query.head_dim;
    std::vector<float> q(static_cast<size_t>(dim));
    for (int i = 0; i < query.group * dim; ++i) {
      q[static_cast<size_t>(i % dim)] += query.heads[i] * query.scale;
    }
    const std::vector<int32_t> slots = candidates(query, choose(query, state, q.data()));
    std::vector<float> scores(slots.size());
    levels_.stored(view, row, slots, q.data(), scores.data());
    std::fill_n(logits, query.tokens, -std::numeric_limits<float>::infinity());
    for (size_t i = 0; i < slots.size(); ++i) logits[view.position(row, slots[i])] = scores[i];
    return 1;
  }

  uint64_t scan_bytes(const RowQuery& query, const State& state) const override {
    const int64_t candidates = std::min(query.tokens, wanted(query) * block_tokens_);
    return state.bytes() +
           static_cast<uint64_t>(stored_bytes(query.view.key().layout().raw(), candidates));
  }

 private:
  int64_t blocks(int64_t tokens) const { return (tokens + block_tokens_ - 1) / block_tokens_; }

  // Blocks to choose. All but the last are full, so the budget finds its tokens in them.
  int64_t wanted(const RowQuery& query) const {
    const int64_t all = blocks(query.tokens);
    const auto pinned = static_cast<int64_t>(query.view.pinned_slots(query.row).size());
    const int64_t needed = blocks(query.budget + pinned) + 1;
    return std::min(all, std::max(blocks_ > 0 ? blocks_ : (all + 3) / 4, needed));
  }

  // The best blocks by q . mean of their keys, the first and the last among them.
  std::vector<bool> choose(const RowQuery& query, const State& state, const float* q) const {
    const int64_t all = blocks(query.tokens);
    std::vector<float> scores(static_cast<size_t>(all));
    levels_.pooled(state.sums.data(), all, query.head_dim, q, scores.data());
    for (int64_t b = 0; b < all; ++b) {
      const int64_t members = std::min(block_tokens_, state.count - b * block_tokens_);
      scores[static_cast<size_t>(b)] /= static_cast<float>(members);
    }
    scores.front() = scores.back() = std::numeric_limits<float>::infinity();
    std::vector<int32_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
    });
    std::vector<bool> chosen(scores.size());
    for (int64_t i = 0; i < wanted(query); ++i) {
      chosen[static_cast<size_t>(order[static_cast<size_t>(i)])] = true;
    }
    return chosen;
  }

  // Slots of the chosen blocks, ascending.
  std::vector<int32_t> candidates(const RowQuery& query, const std::vector<bool>& chosen) const {
    std::vector<int32_t> slots;
    slots.reserve(static_cast<size_t>(wanted(query) * block_tokens_));
    for (int slot = 0; slot < query.view.encoded_len(query.row); ++slot) {
      const int64_t block = query.view.position(query.row, slot) / block_tokens_;
      if (chosen[static_cast<size_t>(block)]) slots.push_back(slot);
    }
    return slots;
  }

  const LevelMath& levels_;
  int64_t block_tokens_, blocks_;
};

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math,
                               const LevelMath& levels) {
  return std::make_unique<Hisa>(args, math, levels);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  static constexpr LevelMath kLevels = {pooled, stored};
  return make(args, kRefRowMath, kLevels);
}

}  // namespace sikv::hisa
