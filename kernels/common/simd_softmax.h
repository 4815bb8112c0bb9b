// Softmax of a query group's logits, on one core.
//
// Include from a file that goes through hwy/foreach_target.h.

#if defined(SIKV_KERNELS_COMMON_SIMD_SOFTMAX_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_SOFTMAX_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_SOFTMAX_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_SOFTMAX_TARGET_
#endif

#include <stdint.h>

#include <algorithm>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

// probability [n] = mean of the softmax of logits [G, stride] over their first n >= 1. Overwrites
// the logits; reads and writes up to 16 elements behind the n-th, of `probability` too.
inline void MeanSoftmax(float* logits, int64_t stride, int group, int64_t n,
                        float* HWY_RESTRICT probability) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::CappedTag<float, 16> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int g = 0; g < group; ++g) {
    float* HWY_RESTRICT row = logits + g * stride;
    // So far below any logit that exp gives 0, and the difference stays finite.
    std::fill_n(row + n, lanes, -1e38f);
    auto highest = hn::Set(d, row[0]);
    for (int64_t i = 0; i < n; i += lanes) highest = hn::Max(highest, hn::LoadU(d, row + i));
    const auto shift = hn::MaxOfLanes(d, highest);
    auto total = hn::Zero(d);
    for (int64_t i = 0; i < n; i += lanes) {
      const auto e = hn::Exp(d, hn::Sub(hn::LoadU(d, row + i), shift));
      hn::StoreU(e, d, row + i);
      total = hn::Add(total, e);
    }
    const float sum = hn::GetLane(hn::SumOfLanes(d, total));
    const auto factor = hn::Set(d, 1.0f / (sum * static_cast<float>(group)));
    for (int64_t i = 0; i < n; i += lanes) {
      const auto before = g == 0 ? hn::Zero(d) : hn::LoadU(d, probability + i);
      hn::StoreU(hn::MulAdd(hn::LoadU(d, row + i), factor, before), d, probability + i);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // SIKV_KERNELS_COMMON_SIMD_SOFTMAX_TARGET_
