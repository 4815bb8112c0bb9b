// The running softmax of one query head: tokens one by one in any order, partial results merged.
//
//   m      largest logit so far, -inf before the first
//   l      sum of exp(logit - m)
//   acc    sum of exp(logit - m) v, [D]
//
// All fp32, in D + 2 floats that the caller owns: | m | l | acc 0 | ... | acc D-1 |
#ifndef SIKV_KERNELS_COMMON_FLASH_STATE_H_
#define SIKV_KERNELS_COMMON_FLASH_STATE_H_

#include <cmath>
#include <limits>

namespace sikv {

class FlashState {
 public:
  static constexpr int floats(int head_dim) { return head_dim + 2; }

  // A view of `storage` [floats(head_dim)]; reset before the first use.
  FlashState(float* storage, int head_dim) : s_(storage), dim_(head_dim) {}

  void reset() {
    s_[0] = kNothing;
    for (int i = 1; i < floats(dim_); ++i) s_[i] = 0.0f;
  }

  // v [D]. A logit of -inf adds nothing.
  void add(float logit, const float* v) { accumulate(logit, 1.0f, v); }

  void merge(const FlashState& other) { accumulate(other.s_[0], other.s_[1], other.s_ + 2); }

  bool empty() const { return s_[0] == kNothing; }

  // As if `shift` had been added to every logit so far.
  void shift_logits(float shift) { s_[0] += shift; }

  // The weight that every token so far has in acc; a constant c in each v is sum() * c there.
  float sum() const { return s_[1]; }
  float* acc() { return s_ + 2; }

  // out [D] = the weighted mean of v, 0 if nothing was added. Returns the log of the sum of
  // exp(logit), then -inf.
  float finish(float* out) const {
    for (int d = 0; d < dim_; ++d) out[d] = empty() ? 0.0f : s_[2 + d] / s_[1];
    return empty() ? kNothing : s_[0] + std::log(s_[1]);
  }

 private:
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();

  // Adds sum l and vector acc, both relative to exp(m).
  void accumulate(float m, float l, const float* acc) {
    if (m == kNothing) return;
    if (m > s_[0]) {
      const float down = std::exp(s_[0] - m);
      for (int i = 1; i < floats(dim_); ++i) s_[i] *= down;
      s_[0] = m;
    }
    const float weight = std::exp(m - s_[0]);
    s_[1] += weight * l;
    for (int d = 0; d < dim_; ++d) s_[2 + d] += weight * acc[d];
  }

  float* s_;
  int dim_;
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_FLASH_STATE_H_
