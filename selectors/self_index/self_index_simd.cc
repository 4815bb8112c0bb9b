// vpshufbitqmb, which picks a token's signs, comes with AVX3_DL.
#define HWY_WANT_AVX3_DL

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "selectors/self_index/self_index_simd.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "kernels/common/simd_logits.h"
#include "kernels/common/simd_scan.h"
#include "kernels/common/simd_select.h"
#include "kernels/common/simd_softmax.h"
#include "selectors/self_index/self_index_simd.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::self_index {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = sikv::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;

// ---- scan ---------------------------------------------------------------------------------------

// best = max(best, scale * integers + offset), or the first of these. Product and sum are rounded
// one by one, as in the reference. n is a multiple of a vector.
HWY_INLINE void MergeIntegers(const uint16_t* HWY_RESTRICT integers, TableScale table, bool first,
                              int64_t n, float* HWY_RESTRICT best) {
  const Floats d;
  const hn::Rebind<int32_t, Floats> di;
  const hn::Rebind<uint16_t, Floats> d16;
  const auto scale = hn::Set(d, table.scale), offset = hn::Set(d, table.offset);
  for (int64_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto integer = hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d16, integers + i)));
    const auto score = hn::Add(hn::Mul(scale, integer), offset);
    hn::StoreU(first ? score : hn::Max(score, hn::LoadU(d, best + i)), d, best + i);
  }
}

HWY_INLINE void MergeScores(const float* HWY_RESTRICT scores, int64_t n, float* HWY_RESTRICT best) {
  const Floats d;
  for (int64_t i = 0; i < n; i += hn::Lanes(d)) {
    hn::StoreU(hn::Max(hn::LoadU(d, scores + i), hn::LoadU(d, best + i)), d, best + i);
  }
}

HWY_INLINE void Weigh(const ScanRequest& request, float* HWY_RESTRICT scores) {
  const Floats d;
  const hn::Rebind<hwy::float16_t, Floats> d16;
  for (int64_t first = 0; first < request.tokens; first += SIKV_PAGE_TOKENS) {
    const int64_t page = request.page_table[first / SIKV_PAGE_TOKENS];
    const auto* weights = reinterpret_cast<const hwy::float16_t*>(
        request.weights.base + page * request.weights.page_stride);
    for (int64_t i = 0; i < SIKV_PAGE_TOKENS; i += hn::Lanes(d)) {
      const auto weight = hn::PromoteTo(d, hn::LoadU(d16, weights + i));
      hn::StoreU(hn::Mul(hn::LoadU(d, scores + first + i), weight), d, scores + first + i);
    }
  }
}

// Whole pages of scores, so that loops over vectors need no remainder.
struct ScanScratch {
  ScanScratch(void* base, int64_t tokens) {
    const int64_t room = whole_pages(tokens);
    best = static_cast<float*>(base);
    scores = best + room;
    integers = reinterpret_cast<uint16_t*>(scores);
    select = scores + room;
  }
  static int64_t whole_pages(int64_t tokens) {
    return (tokens + SIKV_PAGE_TOKENS - 1) / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
  }

  float* best;
  float* scores;       // of one set of exact tables
  uint16_t* integers;  // of one set of 6-bit tables, in the same place
  void* select;
};

int64_t Scan(const ScanRequest& request, void* scratch, int32_t* slots) {
  const IndexPages pages{request.index.base, request.index.page_stride, request.page_table};
  const Excluded excluded{request.excluded, request.num_excluded};
  const IndexTables& tables = request.tables;
  const int64_t tokens = request.tokens;
  if (request.count >= tokens - request.num_excluded) return SelectAll(tokens, excluded, slots);
  if (request.integer_scores) {
    return simd::ScanSelect(pages, tokens, request.head_dim, tables.quantised, excluded,
                            request.count, scratch, slots);
  }
  const ScanScratch s(scratch, tokens);
  const int64_t room = ScanScratch::whole_pages(tokens);
  for (int set = 0; set < tables.sets; ++set) {
    const int64_t entry = int64_t{set} * tables.groups * 16;
    if (tables.six_bit) {
      simd::ScanScores(pages, tokens, request.head_dim, tables.quantised + entry, s.integers,
                       nullptr);
      MergeIntegers(s.integers, tables.scales[set], set == 0, room, s.best);
    } else {
      simd::ScanExact(pages, tokens, request.head_dim, tables.exact + entry,
                      set == 0 ? s.best : s.scores);
      if (set > 0) MergeScores(s.scores, room, s.best);
    }
  }
  if (request.weights.base != nullptr) Weigh(request, s.best);
  return simd::SelectFloat(s.best, tokens, excluded, request.count, s.select, slots);
}

// ---- logits, softmax and selection --------------------------------------------------------------

using simd::LogitsOf;
using simd::MeanSoftmax;
using simd::Runs;

void Select(const float* scores, int64_t n, int64_t budget, void* scratch, int32_t* indices) {
  simd::SelectFloat(scores, n, Excluded{}, budget, scratch, indices);
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv::self_index
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv::self_index {

HWY_EXPORT(Runs);
HWY_EXPORT(Scan);
HWY_EXPORT(LogitsOf);
HWY_EXPORT(MeanSoftmax);
HWY_EXPORT(Select);

bool simd_runs() { return HWY_DYNAMIC_DISPATCH(Runs)(); }
int64_t simd_scan(const ScanRequest& request, void* scratch, int32_t* slots) {
  return HWY_DYNAMIC_DISPATCH(Scan)(request, scratch, slots);
}
size_t simd_scan_bytes(int64_t tokens, int64_t count) {
  const size_t page_tokens = SIKV_PAGE_TOKENS;
  const size_t room = (static_cast<size_t>(tokens) + page_tokens - 1) / page_tokens * page_tokens;
  return 2 * room * sizeof(float) + std::max(RunningSelectBytes(count), SelectFloatBytes(count));
}
void simd_logits(const LogitRequest& request, LogitScratch& scratch, float* logits,
                 int64_t stride) {
  HWY_DYNAMIC_DISPATCH(LogitsOf)(request, scratch, logits, stride);
}
void simd_mean_softmax(float* logits, int64_t stride, int group, int64_t n, float* probability) {
  HWY_DYNAMIC_DISPATCH(MeanSoftmax)(logits, stride, group, n, probability);
}
void simd_select(const float* scores, int64_t n, int64_t budget, void* scratch, int32_t* indices) {
  HWY_DYNAMIC_DISPATCH(Select)(scores, n, budget, scratch, indices);
}
size_t simd_select_bytes(int64_t budget) { return SelectFloatBytes(budget); }

}  // namespace sikv::self_index
#endif  // HWY_ONCE
