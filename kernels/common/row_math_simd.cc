#include "kernels/common/row_math.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/common/row_math_simd.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "hwy/aligned_allocator.h"
#include "kernels/common/simd_select.h"
#include "kernels/common/simd_softmax.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::row_math {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = sikv::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;

bool Runs() { return HWY_TARGET != HWY_SCALAR; }

// One vector of a channel as fp32.
template <int32_t kDtype>
HWY_INLINE hn::Vec<Floats> LoadChannel(const uint8_t* from) {
  const Floats d;
  if constexpr (kDtype == SIKV_FP32) {
    return hn::LoadU(d, reinterpret_cast<const float*>(from));
  } else if constexpr (kDtype == SIKV_FP16) {
    const hn::Rebind<hwy::float16_t, Floats> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(from)));
  } else {
    const hn::Rebind<hwy::bfloat16_t, Floats> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::bfloat16_t*>(from)));
  }
}

// kHeads queries against one page, four vectors of tokens at a time: each number is converted once.
template <int32_t kDtype, int kHeads>
HWY_INLINE void PageLogits(const uint8_t* page, std::span<const int32_t> read, const float* q,
                           float* HWY_RESTRICT logits, int64_t stride) {
  constexpr int64_t kBytes = kDtype == SIKV_FP32 ? 4 : 2;
  constexpr int kVectors = 4;
  const Floats d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t t = 0; t < SIKV_PAGE_TOKENS; t += kVectors * lanes) {
    hn::Vec<Floats> sums[kHeads][kVectors];
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVectors; ++v) sums[h][v] = hn::Zero(d);
    }
    for (size_t c = 0; c < read.size(); ++c) {
      const uint8_t* channel = page + (read[c] * int64_t{SIKV_PAGE_TOKENS} + t) * kBytes;
      hn::Vec<Floats> x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = LoadChannel<kDtype>(channel + v * lanes * kBytes);
      for (int h = 0; h < kHeads; ++h) {
        const auto weight = hn::Set(d, q[static_cast<size_t>(h) * read.size() + c]);
        for (int v = 0; v < kVectors; ++v) sums[h][v] = hn::MulAdd(weight, x[v], sums[h][v]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVectors; ++v) {
        hn::StoreU(sums[h][v], d, logits + h * stride + t + v * lanes);
      }
    }
  }
}

template <int32_t kDtype>
void Logits(const ChannelRequest& request, float* logits, int64_t stride) {
  const int64_t page_bytes =
      int64_t{request.pages.channels()} * SIKV_PAGE_TOKENS * sikv_dtype_bytes(kDtype);
  const auto count = static_cast<int64_t>(request.read.size());
  const uint8_t* page = request.pages.data();
  for (int64_t first = 0; first < request.tokens; first += SIKV_PAGE_TOKENS, page += page_bytes) {
    int g = 0;
    for (; g + 3 <= request.group; g += 3) {
      PageLogits<kDtype, 3>(page, request.read, request.q + g * count, logits + g * stride + first,
                            stride);
    }
    for (; g < request.group; ++g) {
      PageLogits<kDtype, 1>(page, request.read, request.q + g * count, logits + g * stride + first,
                            stride);
    }
  }
}

void ChannelLogits(const ChannelRequest& request, float* logits, int64_t stride) {
  switch (request.pages.dtype()) {
    case SIKV_FP16:
      return Logits<SIKV_FP16>(request, logits, stride);
    case SIKV_BF16:
      return Logits<SIKV_BF16>(request, logits, stride);
    default:
      return Logits<SIKV_FP32>(request, logits, stride);
  }
}

void Softmax(float* logits, int64_t stride, int group, int64_t n, float* out) {
  simd::MeanSoftmax(logits, stride, group, n, out);
}

int64_t Select(const float* scores, int64_t n, Excluded excluded, int64_t budget, void* scratch,
               int32_t* slots) {
  return simd::SelectFloat(scores, n, excluded, budget, scratch, slots);
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv::row_math
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv {
namespace row_math {

HWY_EXPORT(Runs);
HWY_EXPORT(ChannelLogits);
HWY_EXPORT(Softmax);
HWY_EXPORT(Select);

void channel_logits(const ChannelRequest& request, float* logits, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(ChannelLogits)(request, logits, stride);
}
void mean_softmax(float* logits, int64_t stride, int group, int64_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(Softmax)(logits, stride, group, n, out);
}
void select(std::span<const float> scores, std::span<const int32_t> pinned, int64_t budget,
            SelectionRow& out) {
  const auto n = static_cast<int64_t>(scores.size());
  const auto end = std::lower_bound(pinned.begin(), pinned.end(), static_cast<int32_t>(n));
  const Excluded excluded{pinned.data(), end - pinned.begin()};
  budget = std::clamp<int64_t>(budget, 0, n - excluded.count);
  if (budget > std::ssize(out.storage())) {
    throw PluginBug("a selection grew past its planned capacity");
  }
  const auto scratch = hwy::AllocateAligned<uint8_t>(SelectFloatBytes(budget));
  out.set_count(static_cast<int32_t>(HWY_DYNAMIC_DISPATCH(Select)(
      scores.data(), n, excluded, budget, scratch.get(), out.storage().data())));
}

}  // namespace row_math

const RowMath* simd_row_math() {
  static constexpr RowMath kMath = {row_math::channel_logits, row_math::mean_softmax,
                                    row_math::select};
  return HWY_DYNAMIC_DISPATCH(row_math::Runs)() ? &kMath : nullptr;
}

int32_t probe_row_math(const sikv_device*, sikv_message* reason) {
  if (simd_row_math() != nullptr) return 10;
  sdk::write_message(reason, "the processor has no vector instructions that Highway supports");
  return 0;
}

}  // namespace sikv
#endif  // HWY_ONCE
