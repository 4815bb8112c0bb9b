#include "selectors/hisa/hisa.h"

// vpshufbitqmb, which picks a token's signs, comes with AVX3_DL.
#define HWY_WANT_AVX3_DL

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "selectors/hisa/hisa_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "hwy/aligned_allocator.h"
#include "kernels/common/simd_logits.h"
#include "kernels/common/stored_keys.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::hisa {
namespace HWY_NAMESPACE {

void OneHead(const LogitRequest& request, LogitScratch& scratch, float* out) {
  sikv::HWY_NAMESPACE::LogitsOf(request, scratch, out, 0);
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv::hisa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv::hisa {
namespace {

HWY_EXPORT(OneHead);

// `out` is written up to a vector behind its end.
struct Step {
  alignas(64) float q[kMaxHeadDim];
  float shift[1] = {};
  LogitScratch scratch;
  std::vector<float> out;

  void run(const RowSource& rows, SlotRange slots, int head_dim, float* result) {
    out.resize(static_cast<size_t>(PaddedRows(slots.count)) + 16);
    HWY_DYNAMIC_DISPATCH(OneHead)({rows, slots, head_dim, 1, q, shift}, scratch, out.data());
    std::copy_n(out.data(), slots.count, result);
  }
};

void pooled(const float* rows, int64_t count, int head_dim, const float* q, float* result) {
  const auto step = hwy::MakeUniqueAligned<Step>();
  std::copy_n(q, head_dim, step->q);
  step->run(exact_rows(rows, SIKV_FP32, head_dim), {nullptr, 0, static_cast<int32_t>(count)},
            head_dim, result);
}

void stored(const CacheView& view, int row, std::span<const int32_t> slots, const float* q,
            float* result) {
  const auto step = hwy::MakeUniqueAligned<Step>();
  const StoredKeys keys(view, row);
  std::copy_n(q, view.head_dim(), step->q);
  keys.prepare(1, step->q, step->shift);
  step->run(keys.source(), {slots.data(), 0, static_cast<int32_t>(slots.size())}, view.head_dim(),
            result);
}

}  // namespace

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) {
  static constexpr LevelMath kLevels = {pooled, stored};
  return make(args, *simd_row_math(), kLevels);
}

}  // namespace sikv::hisa
#endif  // HWY_ONCE
