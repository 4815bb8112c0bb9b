// vpshufbitqmb, which picks a token's signs, comes with AVX3_DL.
#define HWY_WANT_AVX3_DL

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/common/exact_scores_simd.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "hwy/aligned_allocator.h"
#include "kernels/common/exact_scores.h"
#include "kernels/common/simd_logits.h"
#include "kernels/common/simd_select.h"
#include "kernels/common/simd_softmax.h"
#include "kernels/common/stored_keys.h"

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

void BestOf(const float* scores, int64_t n, int64_t count, void* scratch, int32_t* indices) {
  SelectFloat(scores, n, Excluded{}, count, scratch, indices);
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv {
namespace {

HWY_EXPORT(Runs);
HWY_EXPORT(LogitsOf);
HWY_EXPORT(MeanSoftmax);
HWY_EXPORT(BestOf);

// Grows and is never cleared.
template <typename T>
class Aligned {
 public:
  T* at_least(size_t n) {
    if (n > size_) {
      data_ = hwy::AllocateAligned<T>(n);
      size_ = n;
    }
    return data_.get();
  }

 private:
  hwy::AlignedFreeUniquePtr<T[]> data_;
  size_t size_ = 0;
};

class SimdScorer final : public RowScorer {
 public:
  void score(const ScoreRequest& request, std::vector<float>& scores) override {
    const CacheView& view = request.view;
    const sikv_cache_view& raw = view.raw();
    const int head_dim = view.head_dim(), group = request.group;
    const int64_t listed = std::ssize(request.slots), pinned = raw.pinned_len[request.row];
    const int64_t tokens = listed + pinned + request.tail;
    const int64_t stride = (tokens + kSoftmaxSlack + 15) / 16 * 16;
    float* const q = q_.at_least(static_cast<size_t>(PaddedHeads(group) * head_dim));
    float* const shift = shift_.at_least(static_cast<size_t>(group));
    float* const logits = logits_.at_least(static_cast<size_t>(group * stride));
    scores.resize(static_cast<size_t>(stride));

    const StoredKeys stored(view, request.row);
    load_scaled(request.q, group, head_dim, request.scale, q);
    stored.prepare(group, q, shift);
    int64_t n = 0;
    const auto add = [&](const RowSource& source, const int32_t* slots, int64_t count) {
      if (count == 0) return;
      HWY_DYNAMIC_DISPATCH(LogitsOf)
      ({source, {slots, 0, static_cast<int32_t>(count)}, head_dim, group, q, shift}, *scratch_,
       logits + n, stride);
      n += count;
    };
    add(stored.source(), request.slots.data(), listed);

    load_scaled(request.q, group, head_dim, request.scale, q);
    std::fill_n(shift, group, 0.0f);
    const auto exact = [&](const void* data, int64_t first, int64_t row_stride) {
      return exact_rows(static_cast<const char*>(data) + first * sikv_dtype_bytes(raw.dtype),
                        raw.dtype, row_stride);
    };
    const int64_t heads = raw.num_kv_heads, head = request.row % heads;
    const int64_t sequence = request.row / heads;
    add(exact(raw.pinned_k, int64_t{request.row} * raw.pinned_capacity * head_dim, head_dim),
        nullptr, pinned);
    add(exact(raw.tail_k, (sequence * raw.tail_capacity * heads + head) * head_dim,
              heads * head_dim),
        nullptr, request.tail);
    if (n > 0) HWY_DYNAMIC_DISPATCH(MeanSoftmax)(logits, stride, group, n, scores.data());
    scores.resize(static_cast<size_t>(listed));
  }

  void best(std::span<const float> scores, int64_t count, std::vector<int32_t>& indices) override {
    indices.resize(static_cast<size_t>(count) + static_cast<size_t>(kSelectSlack));
    uint8_t* const scratch = select_.at_least(SelectFloatBytes(count));
    HWY_DYNAMIC_DISPATCH(BestOf)
    (scores.data(), std::ssize(scores), count, scratch, indices.data());
    indices.resize(static_cast<size_t>(count));
  }

 private:
  hwy::AlignedUniquePtr<LogitScratch> scratch_ = hwy::MakeUniqueAligned<LogitScratch>();
  Aligned<float> q_, shift_, logits_;
  Aligned<uint8_t> select_;
};

}  // namespace

bool simd_scorer_runs() { return HWY_DYNAMIC_DISPATCH(Runs)(); }
std::unique_ptr<RowScorer> simd_scorer() { return std::make_unique<SimdScorer>(); }

}  // namespace sikv
#endif  // HWY_ONCE
