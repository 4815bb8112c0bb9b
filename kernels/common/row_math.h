// What selectors that score tokens from a state of their own compute for one row, once in scalar
// code, which is the specification, and once in SIMD (row_math_simd.cc).
#ifndef SIKV_KERNELS_COMMON_ROW_MATH_H_
#define SIKV_KERNELS_COMMON_ROW_MATH_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "kernels/common/channel_pages.h"
#include "plugins/sdk/select.h"

namespace sikv {

// Room for the scores of n tokens: whole pages, and a vector behind the n-th.
constexpr int64_t score_room(int64_t n) {
  return (n + 16 + SIKV_PAGE_TOKENS - 1) / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
}

// Dot products of G queries with the first `tokens` tokens, over the channels `read` (ascending).
struct ChannelRequest {
  const ChannelPages& pages;
  std::span<const int32_t> read;
  const float* q;  // [G, read.size()]
  int group;
  int64_t tokens;
};

struct RowMath {
  // logits [G, stride], stride = score_room(tokens).
  void (*channel_logits)(const ChannelRequest& request, float* logits, int64_t stride);
  // out [n] = mean of the softmax of logits [G, stride] over their first n >= 1; logits are
  // overwritten.
  void (*mean_softmax)(float* logits, int64_t stride, int group, int64_t n, float* out);
  // select_top of plugins/sdk/select.h.
  void (*select)(std::span<const float> scores, std::span<const int32_t> pinned, int64_t budget,
                 SelectionRow& out);
};

namespace row_math_ref {

inline void channel_logits(const ChannelRequest& request, float* logits, int64_t stride) {
  const ChannelPages& pages = request.pages;
  const size_t count = request.read.size();
  for (int g = 0; g < request.group; ++g) {
    const float* q = request.q + static_cast<size_t>(g) * count;
    for (int64_t i = 0; i < request.tokens; ++i) {
      const int64_t page = i / SIKV_PAGE_TOKENS, t = i % SIKV_PAGE_TOKENS;
      float sum = 0.0f;
      for (size_t c = 0; c < count; ++c) {
        const int64_t channel = page * pages.channels() + request.read[c];
        sum += q[c] * sikv_load(pages.data(), pages.dtype(), channel * SIKV_PAGE_TOKENS + t);
      }
      logits[g * stride + i] = sum;
    }
  }
}

inline void mean_softmax(float* logits, int64_t stride, int group, int64_t n, float* out) {
  std::fill_n(out, n, 0.0f);
  for (int g = 0; g < group; ++g) {
    float* row = logits + g * stride;
    const float highest = *std::max_element(row, row + n);
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) sum += row[i] = std::exp(row[i] - highest);
    for (int64_t i = 0; i < n; ++i) out[i] += row[i] / (sum * static_cast<float>(group));
  }
}

}  // namespace row_math_ref

inline constexpr RowMath kRefRowMath = {row_math_ref::channel_logits, row_math_ref::mean_softmax,
                                        select_top};

// Null where the processor has no vectors that Highway knows.
const RowMath* simd_row_math();

// For probe: 10 where simd_row_math() has an answer.
int32_t probe_row_math(const sikv_device* device, sikv_message* reason);

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_ROW_MATH_H_
