// Keys that are ranked where they lie: what turns q.k of their stored form into q.k is folded into
// the query (its rotation, alpha) and into one shift per head (the keys' mean).
#ifndef SIKV_KERNELS_COMMON_STORED_KEYS_H_
#define SIKV_KERNELS_COMMON_STORED_KEYS_H_

#include <algorithm>
#include <cstdint>

#include "kernels/common/simd_attention.h"
#include "kernels/common/stored_rows.h"
#include "plugins/layouts/rotation.h"

namespace sikv {

// `heads` [G, D] times the logits' scale, with zeros for the padding heads.
inline void load_scaled(const float* heads, int group, int head_dim, float scale, float* q) {
  const int64_t used = int64_t{group} * head_dim;
  for (int64_t i = 0; i < used; ++i) q[i] = heads[i] * scale;
  std::fill(q + used, q + int64_t{PaddedHeads(group)} * head_dim, 0.0f);
}

inline double dot_rows(const float* a, const float* b, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += double{a[i]} * b[i];
  return sum;
}

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
      shift[g] = static_cast<float>(dot_rows(head, mean, head_dim));
      if (rotated_) {
        rotation::forward(head, head_dim);
      } else {
        const float* alpha = view_.key().table(SIKV_KEY_SCALE, row_);
        for (int d = 0; d < head_dim; ++d) head[d] *= alpha[d];
      }
    }
  }

 private:
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
