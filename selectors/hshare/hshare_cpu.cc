#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "selectors/hshare/hshare_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "selectors/hshare/hshare.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::hshare {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::CappedTag<float, 16>;

HWY_INLINE hn::Vec<D> Load(const float* from) { return hn::LoadU(D(), from); }
HWY_INLINE hn::Vec<D> Load(const hwy::float16_t* from) {
  return hn::PromoteTo(D(), hn::LoadU(hn::Rebind<hwy::float16_t, D>(), from));
}
HWY_INLINE hn::Vec<D> Load(const hwy::bfloat16_t* from) {
  return hn::PromoteTo(D(), hn::LoadU(hn::Rebind<hwy::bfloat16_t, D>(), from));
}

// Lanes are tokens, and channels are added in ascending order as in the reference. Four vectors of
// sums hide the latency of the additions.
template <typename T>
void ScorePages(const Labels& labels, const float* HWY_RESTRICT q, float* HWY_RESTRICT scores) {
  const D d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const T* page = static_cast<const T*>(labels.data);
  for (int64_t first = 0; first < labels.tokens; first += kPageTokens) {
    for (int64_t t = 0; t < kPageTokens; t += 4 * lanes) {
      auto a = hn::Zero(d), b = a, c = a, e = a;
      for (int channel = 0; channel < labels.channels; ++channel) {
        const T* HWY_RESTRICT from = page + channel * kPageTokens + t;
        const auto x = hn::Set(d, q[channel]);
        a = hn::MulAdd(x, Load(from), a);
        b = hn::MulAdd(x, Load(from + lanes), b);
        c = hn::MulAdd(x, Load(from + 2 * lanes), c);
        e = hn::MulAdd(x, Load(from + 3 * lanes), e);
      }
      float* HWY_RESTRICT to = scores + first + t;
      hn::StoreU(a, d, to);
      hn::StoreU(b, d, to + lanes);
      hn::StoreU(c, d, to + 2 * lanes);
      hn::StoreU(e, d, to + 3 * lanes);
    }
    page += int64_t{labels.channels} * kPageTokens;
  }
}

void ScoreLabels(const Labels& labels, const float* q, float* scores) {
  switch (labels.dtype) {
    case SIKV_FP16:
      return ScorePages<hwy::float16_t>(labels, q, scores);
    case SIKV_BF16:
      return ScorePages<hwy::bfloat16_t>(labels, q, scores);
    default:
      return ScorePages<float>(labels, q, scores);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv::hshare
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv::hshare {
namespace {

HWY_EXPORT(ScoreLabels);

class SimdLabels final : public LabelScorer {
 public:
  void score(const Labels& labels, const float* q, float* scores) const override {
    HWY_DYNAMIC_DISPATCH(ScoreLabels)(labels, q, scores);
  }
};

}  // namespace

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) {
  return make_selector(args, [] { return Engine{std::make_unique<SimdLabels>(), simd_scorer()}; });
}

int32_t probe_cpu(const sikv_device*, sikv_message* reason) {
  if (simd_scorer_runs()) return 10;
  sdk::write_message(reason, "the processor has no vector instructions that Highway supports");
  return 0;
}

}  // namespace sikv::hshare
#endif  // HWY_ONCE
