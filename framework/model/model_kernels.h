// What a transformer does on a GPU besides products of matrices. Every function enqueues on
// `stream` and can be recorded. Kept apart from fmt, whose headers nvcc cannot read as C++20.
#ifndef SIKV_FRAMEWORK_MODEL_MODEL_KERNELS_H_
#define SIKV_FRAMEWORK_MODEL_MODEL_KERNELS_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace sikv::model_kernels {

enum class Float { kFp32, kFp16, kBf16 };

constexpr int float_bytes(Float type) { return type == Float::kFp32 ? 4 : 2; }

// The first thing that is not a finite number: the least `stage << kPositionBits | position` that a
// kernel met, kNoFault if none. Stages follow each other as in the model, so that the least one is
// the cause.
using Fault = unsigned long long;
inline constexpr Fault kNoFault = ~Fault{0};
inline constexpr int kPositionBits = 40;
enum Part { kPartK, kPartV, kPartQ, kPartHidden, kParts };
constexpr int stage(int layer, Part part) { return layer * kParts + part; }

// Where a row of activations stands: `positions` on the device, or rows from `first` on.
struct Positions {
  const int64_t* positions;
  int64_t first;
};

// data [n] = normals of deviation `scale`.
void draw_normals(void* data, Float type, int64_t n, float scale, uint64_t seed,
                  cudaStream_t stream);

// x [n, width] = rows of the embedding.
void embed(const int32_t* tokens, int64_t n, const void* embedding, Float type, int64_t width,
           float* x, cudaStream_t stream);

// out = x / sqrt(mean(x^2) + eps) * weight; a row that is not finite is a fault of `stage`.
void rms_norm(const float* x, const float* weight, int64_t n, int64_t width, float eps, void* out,
              Float type, int stage, Positions at, Fault* fault, cudaStream_t stream);

// qkv [n, Hq + 2 Hkv, D] + bias -> norm of q and k per head -> rotation -> q, k, v as caches take
// them, each contiguous.
struct Rotation {
  int query_heads, kv_heads, head_dim;
  const float *bias, *q_norm, *k_norm;  // nullptr: none
  float eps;
  const double* frequencies;  // [D/2]
  double magnitude;
};
void split_and_rotate(const float* qkv, int64_t n, const Rotation& rotation, Positions at,
                      int layer, Float cache_type, void* q, void* k, void* v, Fault* fault,
                      cudaStream_t stream);

// Causal softmax attention of q [n, Hq, D] at positions first .. over k, v [first + n, Hkv, D], all
// of `cache_type` fp32 or fp16 -> out [n, Hq, D].
bool attention_takes(int head_dim, Float cache_type);
void dense_attention(const void* q, const void* k, const void* v, Float cache_type, int64_t first,
                     int64_t n, int query_heads, int kv_heads, int head_dim, void* out,
                     Float out_type, cudaStream_t stream);

// out [n] = x [n]
void narrow(const float* x, int64_t n, void* out, Float type, cudaStream_t stream);

// out [n, width] = silu(gate) * up of gate_up [n, 2, width]
void silu_multiply(const void* gate_up, int64_t n, int64_t width, void* out, Float type,
                   cudaStream_t stream);

// next [n] = the most likely tokens of logits [n, vocab], the lowest of equal ones.
void most_likely(const float* logits, int64_t n, int64_t vocab, int32_t* next, int stage,
                 Positions at, Fault* fault, cudaStream_t stream);

}  // namespace sikv::model_kernels

#endif  // SIKV_FRAMEWORK_MODEL_MODEL_KERNELS_H_
