#include "selectors/pqcache/pqcache.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "selectors/pqcache/pqcache_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::pqcache {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

void Logits(const CodeRequest& request, float* logits, int64_t stride) {
  const hn::CappedTag<float, 16> d;
  const hn::Rebind<int32_t, decltype(d)> di;
  const hn::Rebind<uint8_t, decltype(d)> d8;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const uint8_t* page = request.codes;
  for (int64_t first = 0; first < request.tokens; first += SIKV_PAGE_TOKENS) {
    for (int64_t t = 0; t < SIKV_PAGE_TOKENS; t += lanes) {
      for (int g = 0; g < request.group; ++g) {
        const float* table = request.tables + g * request.subspaces * request.entries;
        auto sum = hn::Zero(d);
        for (int s = 0; s < request.subspaces; ++s, table += request.entries) {
          const auto codes = hn::PromoteTo(di, hn::LoadU(d8, page + s * SIKV_PAGE_TOKENS + t));
          sum = hn::Add(sum, hn::GatherIndex(d, table, codes));
        }
        hn::StoreU(sum, d, logits + g * stride + first + t);
      }
    }
    page += request.subspaces * SIKV_PAGE_TOKENS;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv::pqcache
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv::pqcache {

HWY_EXPORT(Logits);

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) {
  return make(args, *simd_row_math(),
              [](const CodeRequest& request, float* logits, int64_t stride) {
                HWY_DYNAMIC_DISPATCH(Logits)(request, logits, stride);
              });
}

}  // namespace sikv::pqcache
#endif  // HWY_ONCE
