// What the variants share: the copy of the keys, and the way from the base's selection to the
// pruned one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "plugins/sdk/state.h"
#include "selectors/twilight/twilight.h"

namespace sikv::twilight {
namespace {

class Twilight final : public WrappingSelector {
 public:
  Twilight(const CreateArgs& args, const Math& math)
      : WrappingSelector(args),
        math_(math),
        p_(args.options.number("p")),
        shape_(args.shape),
        host_(args.host),
        copies_(shape_) {}

  Plan plan() override {
    Plan plan = base_.plan();
    // A selection of all has to become a list.
    if (base_.selects_all()) plan.capacity = shape_.max_tokens;
    return plan;
  }
  void begin_sequence(int sequence) override {
    base_.begin_sequence(sequence);
    copies_.reset(sequence);
  }
  void observe(const sikv_observe_args& args, const CacheView& view, Launch launch) override {
    base_.observe(args, launch);
    keep(view.layer(), RowsView(args.keys), newly_encoded(args, view));
  }
  void observe_page(const sikv_observe_page_args& args, const CacheView& view,
                    Launch launch) override {
    base_.observe_page(args, launch);
    keep(view.layer(), RowsView(args.keys), newly_encoded(args, view));
  }

  void run(const sikv_select_args& args, const CacheView& view, Launch launch) override {
    base_.run(args, launch);
    const QueryView queries(args.q, view, args.num_query_heads);
    std::vector<Count> counts(static_cast<size_t>(view.num_rows()));
    parallel_for(host_, view.num_rows(), [&](int64_t row, int32_t) {
      counts[static_cast<size_t>(row)] = prune(args, view, queries, static_cast<int>(row));
    });
    for (const Count& count : counts) {
      scan_bytes_ += count.bytes;
      candidates_ += count.candidates;
      kept_ += count.kept;
    }
    runs_ += static_cast<double>(counts.size());
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = base_.state_bytes();
    for (const std::vector<uint8_t>& copies : copies_) bytes += copies.size();
    return bytes;
  }

 protected:
  Counts own_counters() const override {
    return {{"scan_bytes", scan_bytes_},
            {"runs", runs_},
            {"twilight_candidates", candidates_},
            {"twilight_kept", kept_}};
  }

 private:
  struct Count {
    double bytes = 0, candidates = 0, kept = 0;
  };

  // By position, not by slot: slots move when tokens are evicted.
  void keep(int layer, const RowsView& exact, const std::vector<NewTokens>& encoded) {
    const auto bytes = static_cast<size_t>(copy_bytes(shape_.head_dim));
    for (const NewTokens& rows : encoded) {
      copies_.at(layer, rows.row)
          .resize(static_cast<size_t>(rows.first_position + rows.count) * bytes);
    }
    parallel_for(host_, std::ssize(encoded), [&](int64_t i, int32_t) {
      const NewTokens& rows = encoded[static_cast<size_t>(i)];
      std::vector<float> key(static_cast<size_t>(shape_.head_dim));
      uint8_t* to =
          copies_.at(layer, rows.row).data() + static_cast<size_t>(rows.first_position) * bytes;
      for (int t = 0; t < rows.count; ++t, to += bytes) {
        exact.load(rows.sequence, t, rows.head, shape_.head_dim, key.data());
        write_copy(key.data(), shape_.head_dim, to);
      }
    });
  }

  // Slots of the base's selection, ascending.
  std::vector<int32_t> candidates(const sikv_select_args& args, const CacheView& view,
                                  int row) const {
    const SelectionRow selection(args.selection, row);
    std::vector<int32_t> slots;
    for_each_selected(view, selection, row, [&](int32_t slot) { slots.push_back(slot); });
    if ((base_.flags() & SIKV_SELECTOR_UNORDERED) != 0) std::sort(slots.begin(), slots.end());
    return slots;
  }

  Count prune(const sikv_select_args& args, const CacheView& view, const QueryView& queries,
              int row) {
    const std::vector<int32_t> slots = candidates(args, view, row);
    const int group = queries.group(), dim = view.head_dim();
    const sikv_cache_view& raw = view.raw();
    const int b = row / view.num_kv_heads(), h = row % view.num_kv_heads();
    const int64_t width = int64_t{view.num_kv_heads()} * dim;
    const ExactKeys pinned{raw.pinned_k, raw.dtype, int64_t{row} * raw.pinned_capacity * dim, dim,
                           static_cast<int>(view.pinned_slots(row).size())};
    const ExactKeys tail{raw.tail_k, raw.dtype, int64_t{b} * raw.tail_capacity * width + h * dim,
                         width, view.tail_len(b)};
    const int64_t n = std::ssize(slots), all = n + pinned.count + tail.count;
    // Vectors may overrun a row by what a vector holds.
    const int64_t stride = all + 16;

    std::vector<float> q(static_cast<size_t>(group * dim));
    queries.load_group(row, q.data());
    for (float& x : q) x *= args.scale;
    std::vector<int32_t> positions(slots.size());
    std::transform(slots.begin(), slots.end(), positions.begin(),
                   [&](int32_t slot) { return view.position(row, slot); });
    std::vector<float> logits(static_cast<size_t>(group * stride)),
        weights(static_cast<size_t>(stride));
    math_.copy_logits(copies_.at(view.layer(), row).data(), positions, q.data(), group, dim,
                      logits.data(), stride);
    math_.exact_logits(pinned, q.data(), group, dim, logits.data() + n, stride);
    math_.exact_logits(tail, q.data(), group, dim, logits.data() + n + pinned.count, stride);
    math_.mean_softmax(logits.data(), stride, group, all, weights.data());

    const auto first = weights.begin();
    const double always = std::accumulate(first + n, first + all, 0.0);
    std::vector<uint8_t> kept(slots.size(), 1);
    if (p_ < 1) math_.smallest_set({weights.data(), slots.size()}, p_ - always, kept.data());

    SelectionRow out(args.selection, row);
    const auto total = std::count(kept.begin(), kept.end(), 1);
    // Of a base that selects all of more than it planned, too much may be left for a list.
    if (total <= args.selection.capacity) {
      out.clear();
      for (size_t i = 0; i < slots.size(); ++i) {
        if (kept[i] != 0) out.push(slots[i]);
      }
    }
    const double exact_bytes = static_cast<double>(dim) * sikv_dtype_bytes(raw.dtype);
    return {static_cast<double>(n) * copy_bytes(dim) + static_cast<double>(all - n) * exact_bytes,
            static_cast<double>(n), static_cast<double>(total)};
  }

  const Math& math_;
  const double p_;
  const sikv_shape shape_;
  const sikv_host& host_;
  RowState<std::vector<uint8_t>> copies_;  // [positions, copy_bytes]
  double scan_bytes_ = 0, candidates_ = 0, kept_ = 0, runs_ = 0;
};

}  // namespace

void write_copy(const float* key, int head_dim, uint8_t* copy) {
  const auto [min, max] = std::minmax_element(key, key + head_dim);
  const float zero = *min, scale = (*max - zero) / 15.0f;
  std::memcpy(copy, &scale, sizeof scale);
  std::memcpy(copy + 4, &zero, sizeof zero);
  const auto code = [&](int d) {
    if (scale == 0.0f) return 0;
    return static_cast<int>(std::clamp(std::nearbyint((key[d] - zero) / scale), 0.0f, 15.0f));
  };
  for (int i = 0; i < head_dim / 2; ++i) {
    copy[kHeaderBytes + i] = static_cast<uint8_t>(code(i) | code(head_dim / 2 + i) << 4);
  }
}

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const Math& math) {
  return std::make_unique<Twilight>(args, math);
}

}  // namespace sikv::twilight
