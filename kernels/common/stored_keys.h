// Keys of one row as they are stored, for kernels/common/simd_logits.h.
#ifndef SIKV_KERNELS_COMMON_STORED_KEYS_H_
#define SIKV_KERNELS_COMMON_STORED_KEYS_H_

#include <algorithm>
#include <cstdint>

#include "kernels/common/stored_rows.h"
#include "plugins/layouts/rotation.h"

namespace sikv {

// Where a row's encoded keys lie and what turns q.k of their stored form into q.k.
class StoredKeys {
 public:
  StoredKeys(const CacheView& view, int row)
      : view_(view),
        row_(row),
        rotated_(rlm4::is_keys(view.key().layout())),
        source_(stored_keys(view.raw(), row)) {
    source_.unpack = decode;
    source_.context = &view;
  }

  const RowSource& source() const { return source_; }

  // Brings q [G, D] into the stored keys' space; shift [G] = what is then missing from q.k.
  void prepare(int group, float* q, float* shift) const {
    std::fill_n(shift, group, 0.0f);
    const bool scaled = source_.format == RowFormat::kSignedMinMax2;
    if (!rotated_ && !scaled) return;
    const int head_dim = view_.head_dim();
    const float* mean = view_.key().table(SIKV_KEY_MEAN, row_);
    for (int g = 0; g < group; ++g) {
      float* head = q + int64_t{g} * head_dim;
      shift[g] = dot(head, mean, head_dim);
      if (rotated_) {
        rotation::forward(head, head_dim);
      } else {
        const float* alpha = view_.key().table(SIKV_KEY_SCALE, row_);
        for (int d = 0; d < head_dim; ++d) head[d] *= alpha[d];
      }
    }
  }

 private:
  static float dot(const float* a, const float* b, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += double{a[i]} * b[i];
    return static_cast<float>(sum);
  }
  static void decode(const void* view, int row, const int32_t* slots, int count, float* out) {
    static_cast<const CacheView*>(view)->key().decode(row, {slots, static_cast<size_t>(count)},
                                                      out);
  }

  const CacheView& view_;
  int row_;
  bool rotated_;
  RowSource source_;
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_STORED_KEYS_H_
