#include "kernels/common/window_scores.h"

// vpshufbitqmb, which picks a token's signs, comes with AVX3_DL.
#define HWY_WANT_AVX3_DL

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/common/window_scores_simd.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "hwy/aligned_allocator.h"
#include "kernels/common/simd_logits.h"
#include "kernels/common/simd_softmax.h"
#include "kernels/common/stored_keys.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::window_simd {
namespace HWY_NAMESPACE {

bool Runs() { return sikv::HWY_NAMESPACE::Runs(); }

void Logits(const LogitRequest& request, LogitScratch& scratch, float* logits, int64_t stride) {
  sikv::HWY_NAMESPACE::LogitsOf(request, scratch, logits, stride);
}

void Softmax(float* logits, int64_t stride, int group, int64_t n, float* out) {
  sikv::HWY_NAMESPACE::MeanSoftmax(logits, stride, group, n, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv::window_simd
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv {
namespace window_simd {

HWY_EXPORT(Runs);
HWY_EXPORT(Logits);
HWY_EXPORT(Softmax);

void logits(const PromptKeys& keys, const float* q, int heads, int64_t n, float* logits,
            int64_t stride) {
  constexpr int kHeads = 16;
  const auto scaled =
      hwy::AllocateAligned<float>(static_cast<size_t>(PaddedHeads(heads) * keys.head_dim));
  const auto scratch = hwy::MakeUniqueAligned<LogitScratch>();
  load_scaled(q, heads, keys.head_dim, 1.0f, scaled.get());
  const float shift[kHeads] = {};
  const RowSource source = exact_rows(keys.first, keys.dtype, keys.stride);
  HWY_DYNAMIC_DISPATCH(Logits)
  ({source, {nullptr, 0, static_cast<int32_t>(n)}, keys.head_dim, heads, scaled.get(), shift},
   *scratch, logits, stride);
}

void mean_softmax(float* logits, int64_t stride, int group, int64_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(Softmax)(logits, stride, group, n, out);
}

}  // namespace window_simd

const WindowMath* simd_window_math() {
  static constexpr WindowMath kMath = {window_simd::logits, window_simd::mean_softmax};
  return HWY_DYNAMIC_DISPATCH(window_simd::Runs)() ? &kMath : nullptr;
}

int32_t probe_window_math(const sikv_device*, sikv_message* reason) {
  if (simd_window_math() != nullptr) return 10;
  sdk::write_message(reason, "the processor has no vector instructions that Highway supports");
  return 0;
}

}  // namespace sikv
#endif  // HWY_ONCE
