#include "kernels/common/sign_codes.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/common/sign_codes_simd.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::sign_codes {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_SCALAR

void Logits(const SignRequest& request, float* logits, int64_t stride) {
  sign_logits_ref(request, logits, stride);
}

#else

// One token per 64-bit lane: a word is read once for all heads and planes of the template.
template <int kPlanes>
void LogitsOf(const SignRequest& request, float* logits, int64_t stride) {
  const hn::CappedTag<uint64_t, 8> d;
  const hn::Rebind<float, decltype(d)> df;
  const hn::Rebind<int32_t, decltype(d)> di;
  const hn::Rebind<uint32_t, decltype(d)> du;
  const hn::Rebind<hwy::float16_t, decltype(d)> d16;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const SlicedQueries& queries = request.queries;
  const int words = queries.words, terms = request.terms.channels();
  const auto most = hn::Set(di, ((1 << kPlanes) - 1) * queries.bits);
  for (int64_t first = 0; first < request.tokens; first += SIKV_PAGE_TOKENS) {
    const int64_t page = first / SIKV_PAGE_TOKENS;
    const uint64_t* codes = request.codes.data() + page * words * SIKV_PAGE_TOKENS;
    const auto* halves = reinterpret_cast<const hwy::float16_t*>(request.terms.data()) +
                         page * terms * SIKV_PAGE_TOKENS;
    for (int g = 0; g < request.group; ++g) {
      const uint64_t* planes = queries.data.data() + g * kPlanes * words;
      const auto step = hn::Set(df, queries.step[static_cast<size_t>(g)]);
      const auto scale = hn::Set(df, request.scale);
      float* const out = logits + g * stride + first;
      for (int64_t t = 0; t < SIKV_PAGE_TOKENS; t += lanes) {
        auto distance = hn::Zero(d);
        for (int w = 0; w < words; ++w) {
          const auto code = hn::LoadU(d, codes + w * SIKV_PAGE_TOKENS + t);
          // Horner's rule over planes would shift sums instead of counts; the counts are
          // independent this way.
          for (int j = 0; j < kPlanes; ++j) {
            const auto differ = hn::Xor(code, hn::Set(d, planes[j * words + w]));
            distance = hn::Add(distance, hn::ShiftLeftSame(hn::PopulationCount(differ), j));
          }
        }
        const auto low = hn::BitCast(di, hn::TruncateTo(du, distance));
        auto logit = hn::Mul(step, hn::ConvertTo(df, hn::Sub(most, hn::Add(low, low))));
        const auto term = [&](int channel) HWY_ATTR {
          return hn::PromoteTo(df, hn::LoadU(d16, halves + channel * SIKV_PAGE_TOKENS + t));
        };
        if (terms > 0) logit = hn::Mul(logit, term(0));
        if (terms > 1) logit = hn::Add(logit, term(1 + g));
        hn::StoreU(hn::Mul(scale, logit), df, out + t);
      }
    }
  }
}

void Logits(const SignRequest& request, float* logits, int64_t stride) {
  constexpr decltype(&LogitsOf<1>) kByPlanes[] = {LogitsOf<1>, LogitsOf<2>, LogitsOf<3>,
                                                  LogitsOf<4>, LogitsOf<5>, LogitsOf<6>,
                                                  LogitsOf<7>, LogitsOf<8>};
  kByPlanes[request.queries.planes - 1](request, logits, stride);
}

#endif  // HWY_TARGET != HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace sikv::sign_codes
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv {
namespace sign_codes {
HWY_EXPORT(Logits);
}  // namespace sign_codes

void sign_logits_simd(const SignRequest& request, float* logits, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(sign_codes::Logits)(request, logits, stride);
}

}  // namespace sikv
#endif  // HWY_ONCE
