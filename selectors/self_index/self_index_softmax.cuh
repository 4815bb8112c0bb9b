// Logits and softmax sums of one warp, shared by rerank and replay.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SOFTMAX_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SOFTMAX_CUH_

#include <cfloat>

#include "kernels/common/warp_rows.cuh"
#include "selectors/self_index/self_index_team.cuh"

namespace sikv::self_index {

// 2^x, 0 for -inf, to 2^-22.
__device__ inline float power_of_2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Highest logit and the sum of 2^(logit - highest), of one head. Logits may be -inf.
struct SoftmaxSum {
  float highest = -FLT_MAX, sum = 0.0f;

  __device__ void add(float logit) { merge(logit, 1.0f); }
  __device__ void add(float a, float b) {
    const float top = fmaxf(highest, fmaxf(a, b));
    sum = sum * power_of_2(highest - top) + power_of_2(a - top) + power_of_2(b - top);
    highest = top;
  }
  __device__ void merge(float other_highest, float other_sum) {
    const float top = fmaxf(highest, other_highest);
    sum = sum * power_of_2(highest - top) + other_sum * power_of_2(other_highest - top);
    highest = top;
  }
  __device__ void merge(float2 other) { merge(other.x, other.y); }
  __device__ float2 pair() const { return {highest, sum}; }
  __device__ void merge_lanes(int distance) {
    const float h = __shfl_xor_sync(~0u, highest, distance);
    const float s = __shfl_xor_sync(~0u, sum, distance);
    merge(h, s);
  }
};

// Logits of tokens that a warp reads 8 channels a lane: `lanes` lanes a token, a power of two of at
// least D / 8.
struct UnitReader {
  int lanes, sub, unit, token;  // `token`: which of the 32 / lanes tokens of the warp

  __device__ explicit UnitReader(int head_dim)
      : lanes(head_dim <= 64    ? 8
              : head_dim <= 128 ? 16
                                : 32) {
    const int lane = threadIdx.x % 32;
    sub = lane % lanes;
    token = lane / lanes;
    unit = sub * cuda::kUnit < head_dim ? sub : -1;
  }
  __device__ int tokens() const { return 32 / lanes; }

  // Logit of head h in logits[h / lanes] of the lane with sub = h % lanes. q [G, D].
  __device__ void dot(const float (&x)[cuda::kUnit], const float* q, int group, int head_dim,
                      float (&logits)[2]) const {
#pragma unroll
    for (int h = 0; h < kMaxGroup; ++h) {
      if (h >= group) break;
      float sum = 0.0f;
      if (unit >= 0) {
        const auto* head = reinterpret_cast<const float4*>(q + h * head_dim) + 2 * unit;
        const float4 a = head[0], b = head[1];
        sum = a.x * x[0] + a.y * x[1] + a.z * x[2] + a.w * x[3] + b.x * x[4] + b.y * x[5] +
              b.z * x[6] + b.w * x[7];
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(~0u, sum, distance);
      }
      if (h == sub) logits[0] = sum;
      if (h == sub + lanes) logits[1] = sum;
    }
  }
};

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SOFTMAX_CUH_
