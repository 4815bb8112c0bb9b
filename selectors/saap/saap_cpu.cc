#include "selectors/saap/saap.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "selectors/saap/saap_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::saap {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Eight vectors of y stay in registers while x goes by.
void Affine(const float* x, int m, const float* w, const float* b, int n, float* y) {
  constexpr int kVectors = 8;
  const hn::CappedTag<float, 16> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int j = 0;
  for (; j + kVectors * lanes <= n; j += kVectors * lanes) {
    hn::Vec<decltype(d)> sums[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = b != nullptr ? hn::LoadU(d, b + j + v * lanes) : hn::Zero(d);
    }
    for (int i = 0; i < m; ++i) {
      const auto xi = hn::Set(d, x[i]);
      const float* row = w + int64_t{i} * n + j;
      for (int v = 0; v < kVectors; ++v) {
        sums[v] = hn::MulAdd(xi, hn::LoadU(d, row + v * lanes), sums[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sums[v], d, y + j + v * lanes);
  }
  for (; j < n; j += lanes) {
    const auto width = static_cast<size_t>(HWY_MIN(lanes, n - j));
    const auto mask = hn::FirstN(d, width);
    auto sum = b != nullptr ? hn::MaskedLoad(mask, d, b + j) : hn::Zero(d);
    for (int i = 0; i < m; ++i) {
      sum = hn::MulAdd(hn::Set(d, x[i]), hn::MaskedLoad(mask, d, w + int64_t{i} * n + j), sum);
    }
    hn::BlendedStore(sum, mask, d, y + j);
  }
}

void Spread(const uint16_t* buckets, int64_t tokens, const float* values, float* out) {
  const hn::CappedTag<float, 16> d;
  const hn::Rebind<int32_t, decltype(d)> di;
  const hn::Rebind<uint16_t, decltype(d)> d16;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t t = 0;
  for (; t + lanes <= tokens; t += lanes) {
    hn::StoreU(hn::GatherIndex(d, values, hn::PromoteTo(di, hn::LoadU(d16, buckets + t))), d,
               out + t);
  }
  for (; t < tokens; ++t) out[t] = values[buckets[t]];
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv::saap
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv::saap {

HWY_EXPORT(Affine);
HWY_EXPORT(Spread);

namespace {

constexpr Math kMath = {
    [](const float* x, int m, const float* w, const float* b, int n, float* y) {
      HWY_DYNAMIC_DISPATCH(Affine)(x, m, w, b, n, y);
    },
    [](const uint16_t* buckets, int64_t tokens, const float* values, float* out) {
      HWY_DYNAMIC_DISPATCH(Spread)(buckets, tokens, values, out);
    }};

}  // namespace

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) {
  return make(args, *simd_row_math(), kMath);
}

}  // namespace sikv::saap
#endif  // HWY_ONCE
