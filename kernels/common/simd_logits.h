// Logits of one query group over rows as they are stored, on one core.
//
// Include from a file that goes through hwy/foreach_target.h.

#ifndef SIKV_KERNELS_COMMON_SIMD_LOGITS_H_
#define SIKV_KERNELS_COMMON_SIMD_LOGITS_H_

#include <stdint.h>

#include <algorithm>

#include "kernels/common/simd_attention.h"

namespace sikv {

struct LogitScratch {
  RowBlock blocks[2];
  alignas(64) float rows[kBlockRows * kMaxHeadDim];
  alignas(64) float logits[kQuad * kBlockRows];
};

// logits [G, stride] of the rows of `source` in `slots`: row_scale * q.k + shift.
struct LogitRequest {
  const RowSource& source;
  SlotRange slots;
  int head_dim;
  int group;           // G
  const float* q;      // [PaddedHeads(G), D] in the rows' space, times the logits' scale; aligned
  const float* shift;  // [G]
};

// What MeanSoftmax (simd_softmax.h) may overrun its arrays by, in elements.
inline constexpr int64_t kSoftmaxSlack = 16;

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_LOGITS_H_

#if defined(SIKV_KERNELS_COMMON_SIMD_LOGITS_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_LOGITS_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_LOGITS_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_LOGITS_TARGET_
#endif

#include "kernels/common/simd_attention.h"

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

// Runs: whether the target has the vectors that LogitsOf is written for.
#if HWY_TARGET == HWY_SCALAR

inline bool Runs() { return false; }
inline void LogitsOf(const LogitRequest&, LogitScratch&, float*, int64_t) {}

#else

inline bool Runs() { return true; }

inline void LogitsOf(const LogitRequest& request, LogitScratch& scratch, float* HWY_RESTRICT logits,
                     int64_t stride) {
  const DF d;
  const auto dim = static_cast<size_t>(request.head_dim);
  const int heads = PaddedHeads(request.group);
  const int pass = std::min(heads, kQuad), ways = pass == kQuad ? 2 : pass - 1;
  const RowStream rows(request.source, dim, heads, scratch.rows);
  SlotCursor cursor(request.slots);
  int32_t slots[2][kBlockRows];
  const auto locate = [&](int which) {
    const int count = cursor.next(slots[which]);
    rows.locate(slots[which], count, scratch.blocks[which]);
    return count;
  };
  int count = locate(0);
  rows.request(scratch.blocks[0]);
  RowBlock none;
  for (int which = 0; count > 0; which = 1 - which) {
    RowBlock& block = scratch.blocks[which];
    const int next = locate(1 - which);
    rows.open(slots[which], scratch.blocks[1 - which], block);
    for (int h = 0; h < heads; h += pass) {
      const bool requests = h == 0 && &rows.source() == &request.source;
      rows.ops().logits[ways](rows.source(), block, requests ? scratch.blocks[1 - which] : none,
                              request.q + h * request.head_dim, dim, scratch.logits);
      for (int g = h; g < std::min(h + pass, request.group); ++g) {
        const auto shift = hn::Set(d, request.shift[g]);
        for (size_t t = 0; t < static_cast<size_t>(count); t += kLanes) {
          const auto dot = hn::Load(d, scratch.logits + (g - h) * kBlockRows + t);
          const auto factor = rows.scaled() ? hn::Load(d, block.scale + t) : hn::Set(d, 1.0f);
          hn::StoreU(hn::MulAdd(dot, factor, shift), d, logits + g * stride + t);
        }
      }
    }
    logits += count;
    count = next;
  }
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // SIKV_KERNELS_COMMON_SIMD_LOGITS_TARGET_
