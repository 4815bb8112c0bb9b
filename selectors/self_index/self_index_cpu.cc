// SIMD engine. Keys are ranked where they lie: rotated queries meet rotated keys, and what encoded
// keys lack (their mean) or share (alpha) is folded into the query once per step.

#include <algorithm>
#include <cmath>
#include <span>

#include "plugins/layouts/rlm4_v1.h"
#include "plugins/layouts/rotation.h"
#include "plugins/layouts/sign4_v1.h"
#include "selectors/self_index/self_index_engine.h"
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

// `heads` [G, D] times the logits' scale, with zeros for the padding heads.
void load_scaled(const float* heads, int group, int head_dim, float scale, float* q) {
  const int64_t used = int64_t{group} * head_dim;
  for (int64_t i = 0; i < used; ++i) q[i] = heads[i] * scale;
  std::fill(q + used, q + int64_t{PaddedHeads(group)} * head_dim, 0.0f);
}

double dot(const float* a, const float* b, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += double{a[i]} * b[i];
  return sum;
}

RowFormat exact_format(int32_t dtype) {
  return dtype == SIKV_FP16   ? RowFormat::kFp16
         : dtype == SIKV_BF16 ? RowFormat::kBf16
                              : RowFormat::kFp32;
}

// Rows of the input type, `stride` elements apart.
RowSource exact_rows(const void* first, int32_t dtype, int64_t stride) {
  RowSource source{exact_format(dtype)};
  const int64_t bytes = stride * sikv_dtype_bytes(dtype);
  source.code = {static_cast<const uint8_t*>(first), bytes * SIKV_PAGE_TOKENS, bytes};
  return source;
}

// The levels of rlm4(bits), repeated: [16].
const float* rlm4_levels(int bits) {
  struct Tables {
    Tables() {
      for (int bits = 2; bits <= 4; ++bits) {
        for (int i = 0; i < 16; ++i) {
          level[bits - 2][i] = rlm4::level_value(bits, i % rlm4::num_levels(bits));
        }
      }
    }
    alignas(64) float level[3][16];
  };
  static const Tables tables;
  return tables.level[bits - 2];
}

// Where a row's encoded keys lie and what turns q.k of their stored form into q.k.
class StoredKeys {
 public:
  StoredKeys(const CacheView& view, int row)
      : view_(view), row_(row), rotated_(is_rotated(view.key().layout())) {
    const LayoutView& layout = view.key().layout();
    source_.page_table = view.raw().page_table + int64_t{row} * view.raw().max_pages;
    source_.unpack = decode;
    source_.context = &view;
    source_.row = row;
    if (rotated_) {
      const rlm4::Params p = rlm4::read_params(layout);
      constexpr RowFormat kFormats[] = {RowFormat::kSigned1, RowFormat::kSigned2,
                                        RowFormat::kSigned3};
      source_.format = kFormats[p.bits - 2];
      source_.table = rlm4_levels(p.bits);
      source_.code = plane(SIKV_MAGNITUDE, rlm4::magnitude_bytes(p));
      source_.sign = plane(SIKV_INDEX_CODE, rlm4::index_tile_bytes(p));
      source_.scale = plane(SIKV_SCALE, rlm4::kScaleBytes);
      return;
    }
    const sign4::Params p = sign4::read_params(layout);
    if (p.magnitude_bits == 16) {
      source_.format = exact_format(p.key_dtype);
      source_.code = plane(SIKV_MAGNITUDE, sign4::magnitude_bytes(p));
    } else if (p.magnitude_bits == 2 && p.scale_group % 32 == 0) {
      source_.format = RowFormat::kSignedMinMax2;
      source_.code = plane(SIKV_MAGNITUDE, sign4::magnitude_bytes(p));
      source_.sign = plane(SIKV_INDEX_CODE, sign4::index_tile_bytes(p));
      source_.scale = plane(SIKV_SCALE, sign4::scale_bytes(p));
      source_.scale_group = p.scale_group;
      source_.scale_dtype = p.scale_dtype;
    }
  }

  const RowSource& source() const { return source_; }

  // Brings q [G, D] into the stored keys' space; shift [G] = what is then missing from q.k.
  void prepare(int group, float* q, float* shift) const {
    std::fill_n(shift, group, 0.0f);
    const bool scaled = source_.format == RowFormat::kSignedMinMax2;
    if (!rotated_ && !scaled) return;
    const int head_dim = view_.head_dim();
    const float* mean = view_.key().table(SIKV_KEY_MEAN, row_);
    for (int g = 0; g < group; ++g) {
      float* head = q + int64_t{g} * head_dim;
      shift[g] = static_cast<float>(dot(head, mean, head_dim));
      if (rotated_) {
        rotation::forward(head, head_dim);
      } else {
        const float* alpha = view_.key().table(SIKV_KEY_SCALE, row_);
        for (int d = 0; d < head_dim; ++d) head[d] *= alpha[d];
      }
    }
  }

 private:
  RowPlane plane(sikv_role role, int token_bytes) const {
    const sikv_store_view& store = view_.raw().key;
    const int i = view_.key().layout().plane(role);
    return {static_cast<const uint8_t*>(store.planes[i]), store.page_stride_bytes[i], token_bytes};
  }
  static void decode(const void* view, int row, const int32_t* slots, int count, float* out) {
    static_cast<const CacheView*>(view)->key().decode(row, {slots, static_cast<size_t>(count)},
                                                      out);
  }

  const CacheView& view_;
  int row_;
  bool rotated_;
  RowSource source_{RowFormat::kUnpacked};
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

  void rerank(const RowQuery& query, std::span<const int32_t> candidates, int64_t budget,
              std::byte* scratch, int32_t* kept) const override {
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
    int64_t n = candidates.size();
    simd_logits({stored.source(),
                 {candidates.data(), 0, static_cast<int32_t>(n)},
                 head_dim,
                 query.group,
                 s.q,
                 s.shift},
                *s.blocks, s.logits, s.stride);

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
