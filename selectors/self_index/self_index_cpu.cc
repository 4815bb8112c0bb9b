// SIMD engine. Keys are ranked where they lie: rotated queries meet rotated keys, and what encoded
// keys lack (their mean) or share (alpha) is folded into the query once per step.

#include <algorithm>
#include <cmath>
#include <span>

#include "kernels/common/stored_keys.h"
#include "selectors/self_index/self_index_engine.h"
#include "selectors/self_index/self_index_packed.h"
#include "selectors/self_index/self_index_simd.h"

namespace sikv::self_index {
namespace {

// Of one row's rerank, or of one query of the prompt: `tokens` logits per head.
struct LogitsScratch {
  LogitsScratch(Arena& arena, const Limits& limits, int64_t tokens)
      : stride((tokens + kSoftmaxSlack + 15) / 16 * 16),
        blocks(arena.take<LogitScratch>(1)),
        q(arena.take<float>(int64_t{PaddedHeads(limits.group)} * limits.head_dim)),
        shift(arena.take<float>(limits.group)),
        logits(arena.take<float>(limits.group * stride)),
        probability(arena.take<float>(stride)) {}

  int64_t stride;
  LogitScratch* blocks;
  float* q;            // [PaddedHeads(G), D]
  float* shift;        // [G]
  float* logits;       // [G, stride]
  float* probability;  // [stride]
};

struct RerankScratch : LogitsScratch {
  // Pinned tokens and tail are no more than the sequence.
  RerankScratch(Arena& arena, const Limits& limits)
      : LogitsScratch(arena, limits, limits.candidates + limits.tokens),
        indices(arena.take<int32_t>(limits.candidates)),
        select(arena.take<std::byte>(simd_select_bytes(limits.scanned))) {}

  int32_t* indices;
  std::byte* select;
};

class CpuEngine final : public Engine {
 public:
  explicit CpuEngine(const Config& config) : config_(config) {}

  size_t scratch_bytes(const Limits& limits) const override {
    Arena rerank(nullptr), prompt(nullptr);
    RerankScratch(rerank, limits);
    LogitsScratch(prompt, limits, limits.tokens);
    return std::max({simd_scan_bytes(limits.tokens, limits.scanned), rerank.used(), prompt.used()});
  }

  int64_t scan(const CacheView& view, int row, const IndexTables& tables, int64_t count,
               std::byte* scratch, int32_t* slots) const override {
    const auto pinned = view.pinned_slots(row);
    const auto end = std::lower_bound(pinned.begin(), pinned.end(), view.encoded_len(row));
    return simd_scan({.tables = tables,
                      .head_dim = view.head_dim(),
                      .tokens = view.encoded_len(row),
                      .page_table = view.raw().page_table + int64_t{row} * view.raw().max_pages,
                      .index = plane(view, SIKV_INDEX_CODE),
                      .weights = config_.norm_weighting ? plane(view, SIKV_SCALE) : PlanePages{},
                      .excluded = pinned.data(),
                      .num_excluded = end - pinned.begin(),
                      .count = count,
                      .integer_scores = config_.integer_scores()},
                     scratch, slots);
  }

  void pack(const CacheView& view, int row, std::span<const int32_t> slots,
            PackedKeys& packed) const override {
    packed.count = 0;
    const StoredKeys stored(view, row);
    const RowFormat format = stored.source().format;
    if (format < RowFormat::kSigned1 || format > RowFormat::kSigned3) return;
    simd_pack(stored.source(), slots, view.head_dim(), packed);
  }

  void rerank(const RowQuery& query, const Candidates& all, int64_t budget, std::byte* scratch,
              int32_t* kept) const override {
    const std::span<const int32_t> candidates = all.slots;
    const CacheView& view = query.view;
    const sikv_cache_view& raw = view.raw();
    const int head_dim = view.head_dim(), sequence = query.row / view.num_kv_heads();
    Arena arena(scratch);
    const int64_t exact = raw.pinned_len[query.row] + raw.tail_len[sequence];
    const RerankScratch s(
        arena, {head_dim, query.group, exact, budget, static_cast<int64_t>(candidates.size())});

    const StoredKeys stored(view, query.row);
    load_scaled(query.heads, query.group, head_dim, query.scale, s.q);
    stored.prepare(query.group, s.q, s.shift);
    int64_t n = all.packed.count;
    simd_packed_logits(all.packed, query.group, s.q, s.shift, s.logits, s.stride);
    const auto gathered = candidates.subspan(n);
    simd_logits({stored.source(),
                 {gathered.data(), 0, static_cast<int32_t>(gathered.size())},
                 head_dim,
                 query.group,
                 s.q,
                 s.shift},
                *s.blocks, s.logits + n, s.stride);
    n = candidates.size();

    load_scaled(query.heads, query.group, head_dim, query.scale, s.q);
    std::fill_n(s.shift, query.group, 0.0f);
    const auto add_exact = [&](const void* data, int64_t first, int64_t stride, int32_t count) {
      const auto* from = static_cast<const char*>(data) + first * sikv_dtype_bytes(raw.dtype);
      simd_logits({exact_rows(from, raw.dtype, stride),
                   {nullptr, 0, count},
                   head_dim,
                   query.group,
                   s.q,
                   s.shift},
                  *s.blocks, s.logits + n, s.stride);
      n += count;
    };
    const int64_t heads = view.num_kv_heads(), head = query.row % heads;
    add_exact(raw.pinned_k, int64_t{query.row} * raw.pinned_capacity * head_dim, head_dim,
              raw.pinned_len[query.row]);
    add_exact(raw.tail_k, (int64_t{sequence} * raw.tail_capacity * heads + head) * head_dim,
              heads * head_dim, raw.tail_len[sequence]);

    simd_mean_softmax(s.logits, s.stride, query.group, n, s.probability);
    simd_select(s.probability, candidates.size(), budget, s.select, s.indices);
    for (int64_t i = 0; i < budget; ++i) kept[i] = candidates[s.indices[i]];
  }

  void attend_prompt(const PromptQuery& query, int64_t count, std::byte* scratch,
                     float* probability) const override {
    Arena arena(scratch);
    const LogitsScratch s(arena, {query.head_dim, query.group, count, 0, 0}, count);
    load_scaled(query.heads, query.group, query.head_dim, query.scale, s.q);
    std::fill_n(s.shift, query.group, 0.0f);
    const void* first = query.keys.address(query.sequence, 0, query.head);
    const int64_t stride = query.keys.offset(query.sequence, 1, query.head) -
                           query.keys.offset(query.sequence, 0, query.head);
    simd_logits({exact_rows(first, query.keys.dtype(), stride),
                 {nullptr, 0, static_cast<int32_t>(count)},
                 query.head_dim,
                 query.group,
                 s.q,
                 s.shift},
                *s.blocks, s.logits, s.stride);
    simd_mean_softmax(s.logits, s.stride, query.group, count, s.probability);
    std::copy_n(s.probability, count, probability);
  }

 private:
  static PlanePages plane(const CacheView& view, sikv_role role) {
    const sikv_store_view& store = view.raw().key;
    const int i = view.key().layout().plane(role);
    return {static_cast<const uint8_t*>(store.planes[i]), store.page_stride_bytes[i]};
  }

  Config config_;
};

}  // namespace

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) {
  const Config config(args.options);
  return make_selector(args, config, std::make_unique<CpuEngine>(config));
}

int32_t probe_cpu(const sikv_device*, sikv_message* reason) {
  if (simd_runs()) return 10;
  sdk::write_message(reason, "the processor has no vector instructions that Highway supports");
  return 0;
}

}  // namespace sikv::self_index
