#include "framework/model/model_kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "framework/device/cuda_error.h"

namespace sikv::model_kernels {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kLargestHalf = 128;  // of a head

// body(T{}) with the C++ type of `type`.
template <typename Body>
void with_type(Float type, Body&& body) {
  switch (type) {
    case Float::kFp32:
      return body(float{});
    case Float::kFp16:
      return body(__half{});
    case Float::kBf16:
      return body(__nv_bfloat16{});
  }
}

__device__ float widened(float x) { return x; }
__device__ float widened(__half x) { return __half2float(x); }
__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T narrowed(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(x);
  } else {
    return __float2bfloat16(x);
  }
}

__device__ int64_t position_of(Positions at, int64_t row) {
  return at.positions != nullptr ? at.positions[row] : at.first + row;
}

__device__ void report(Fault* fault, int stage, int64_t position) {
  atomicMin(fault, static_cast<Fault>(stage) << kPositionBits | static_cast<Fault>(position));
}

__device__ float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

__device__ float block_sum(float x) {
  __shared__ float of_warp[kWarp];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % kWarp < blockDim.x / kWarp ? of_warp[threadIdx.x % kWarp] : 0.0f);
}

__device__ uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

template <typename T>
__global__ void draw_normals_kernel(T* data, int64_t n, float scale, uint64_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    const uint64_t bits = mixed(seed ^ mixed(static_cast<uint64_t>(i)));
    // Box-Muller; the first number is never 0.
    const float u = (static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f;
    const float turn = static_cast<float>(bits & 0xffffff) * 0x1p-23f;
    data[i] = narrowed<T>(scale * sqrtf(-2 * logf(u)) * cospif(turn));
  }
}

template <typename T>
__global__ void embed_kernel(const int32_t* tokens, const T* embedding, int64_t width, float* x) {
  const int64_t row = blockIdx.x;
  const T* const from = embedding + tokens[row] * width;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) x[row * width + c] = widened(from[c]);
}

template <typename T>
__global__ void rms_norm_kernel(const float* x, const float* weight, int64_t width, float eps,
                                T* out, int stage, Positions at, Fault* fault) {
  const int64_t row = blockIdx.x;
  x += row * width;
  out += row * width;
  float squares = 0;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) squares += x[c] * x[c];
  squares = block_sum(squares);
  if (threadIdx.x == 0 && !isfinite(squares)) report(fault, stage, position_of(at, row));
  const float scale = rsqrtf(squares / static_cast<float>(width) + eps);
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    out[c] = narrowed<T>(x[c] * scale * weight[c]);
  }
}

// A block per token, a warp per head.
template <typename T>
__global__ void split_and_rotate_kernel(const float* qkv, Rotation r, Positions at, int layer, T* q,
                                        T* k, T* v, Fault* fault) {
  __shared__ float cosine[kLargestHalf], sine[kLargestHalf];
  const int64_t row = blockIdx.x, position = position_of(at, row);
  const int half = r.head_dim / 2, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    double s, c;
    sincos(static_cast<double>(position) * r.frequencies[i], &s, &c);
    cosine[i] = static_cast<float>(r.magnitude * c);
    sine[i] = static_cast<float>(r.magnitude * s);
  }
  __syncthreads();
  const int heads = r.query_heads + 2 * r.kv_heads;
  for (int head = threadIdx.x / kWarp; head < heads; head += blockDim.x / kWarp) {
    const bool is_q = head < r.query_heads, is_v = head >= r.query_heads + r.kv_heads;
    const float* const from = qkv + (row * heads + head) * r.head_dim;
    const float* const bias = r.bias == nullptr ? nullptr : r.bias + int64_t{head} * r.head_dim;
    const float* const norm = is_q ? r.q_norm : is_v ? nullptr : r.k_norm;
    float low[kLargestHalf / kWarp], high[kLargestHalf / kWarp], squares = 0;
#pragma unroll
    for (int j = 0; j < kLargestHalf / kWarp; ++j) {
      const int i = lane + j * kWarp;
      if (i >= half) break;
      low[j] = from[i] + (bias == nullptr ? 0.0f : bias[i]);
      high[j] = from[half + i] + (bias == nullptr ? 0.0f : bias[half + i]);
      squares += low[j] * low[j] + high[j] * high[j];
    }
    const float scale =
        norm == nullptr ? 1.0f : rsqrtf(warp_sum(squares) / static_cast<float>(r.head_dim) + r.eps);
    T* const to = is_q   ? q + (row * r.query_heads + head) * r.head_dim
                  : is_v ? v + (row * r.kv_heads + head - r.query_heads - r.kv_heads) * r.head_dim
                         : k + (row * r.kv_heads + head - r.query_heads) * r.head_dim;
    bool good = true;
#pragma unroll
    for (int j = 0; j < kLargestHalf / kWarp; ++j) {
      const int i = lane + j * kWarp;
      if (i >= half) break;
      float a = low[j], b = high[j];
      if (norm != nullptr) {
        a *= scale * norm[i];
        b *= scale * norm[half + i];
      }
      if (!is_v) {
        const float turned = a * cosine[i] - b * sine[i];
        b = b * cosine[i] + a * sine[i];
        a = turned;
      }
      to[i] = narrowed<T>(a);
      to[half + i] = narrowed<T>(b);
      good = good && isfinite(widened(to[i])) && isfinite(widened(to[half + i]));
    }
    if (!good) {
      report(fault, stage(layer, is_q ? kPartQ : is_v ? kPartV : kPartK), position);
    }
  }
}

template <typename T>
__global__ void narrow_kernel(const float* x, int64_t n, T* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) out[i] = narrowed<T>(x[i]);
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T of[kWidth];
};

// kWidth channels per thread.
template <typename T, int kWidth>
__global__ void silu_multiply_kernel(const T* gate_up, int64_t width, T* out) {
  using P = Pack<T, kWidth>;
  const int64_t c = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth, row = blockIdx.y;
  if (c >= width) return;
  const P gate = *reinterpret_cast<const P*>(gate_up + 2 * row * width + c);
  const P up = *reinterpret_cast<const P*>(gate_up + (2 * row + 1) * width + c);
  P product;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float g = widened(gate.of[j]);
    product.of[j] = narrowed<T>(g / (1 + __expf(-g)) * widened(up.of[j]));
  }
  *reinterpret_cast<P*>(out + row * width + c) = product;
}

// Grows with the value; equal ones with falling index.
__device__ unsigned long long ranked(float value, int64_t index) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 |
         (0xffffffffu - static_cast<unsigned>(index));
}

__global__ void most_likely_kernel(const float* logits, int64_t vocab, int32_t* next, int stage,
                                   Positions at, Fault* fault) {
  __shared__ unsigned long long best_of_block;
  if (threadIdx.x == 0) best_of_block = 0;
  __syncthreads();
  const float* const of = logits + blockIdx.x * vocab;
  unsigned long long best = 0;
  bool good = true;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < vocab; i += blockDim.x) {
    const float x = of[i];
    good = good && isfinite(x);
    best = max(best, ranked(x, i));
  }
  if (!good) report(fault, stage, position_of(at, blockIdx.x));
  atomicMax(&best_of_block, best);
  __syncthreads();
  if (threadIdx.x == 0) {
    next[blockIdx.x] = static_cast<int32_t>(0xffffffffu - static_cast<unsigned>(best_of_block));
  }
}

unsigned blocks_for(int64_t n, int threads) {
  return static_cast<unsigned>((n + threads - 1) / threads);
}

}  // namespace

void draw_normals(void* data, Float type, int64_t n, float scale, uint64_t seed,
                  cudaStream_t stream) {
  const unsigned blocks = std::min(blocks_for(n, kThreads), 1u << 14);
  with_type(type, [&](auto t) {
    draw_normals_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<decltype(t)*>(data), n, scale,
                                                         seed);
  });
  check_cuda_launch("draw_normals", blocks, kThreads, stream);
}

void embed(const int32_t* tokens, int64_t n, const void* embedding, Float type, int64_t width,
           float* x, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(n);
  with_type(type, [&](auto t) {
    embed_kernel<<<blocks, kThreads, 0, stream>>>(
        tokens, static_cast<const decltype(t)*>(embedding), width, x);
  });
  check_cuda_launch("embed", blocks, kThreads, stream);
}

void rms_norm(const float* x, const float* weight, int64_t n, int64_t width, float eps, void* out,
              Float type, int stage, Positions at, Fault* fault, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(n);
  with_type(type, [&](auto t) {
    rms_norm_kernel<<<blocks, kThreads, 0, stream>>>(
        x, weight, width, eps, static_cast<decltype(t)*>(out), stage, at, fault);
  });
  check_cuda_launch("rms_norm", blocks, kThreads, stream);
}

void split_and_rotate(const float* qkv, int64_t n, const Rotation& rotation, Positions at,
                      int layer, Float cache_type, void* q, void* k, void* v, Fault* fault,
                      cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(n);
  with_type(cache_type, [&](auto t) {
    using T = decltype(t);
    split_and_rotate_kernel<<<blocks, kThreads, 0, stream>>>(qkv, rotation, at, layer,
                                                             static_cast<T*>(q), static_cast<T*>(k),
                                                             static_cast<T*>(v), fault);
  });
  check_cuda_launch("split_and_rotate", blocks, kThreads, stream);
}

void narrow(const float* x, int64_t n, void* out, Float type, cudaStream_t stream) {
  const unsigned blocks = blocks_for(n, kThreads);
  with_type(type, [&](auto t) {
    narrow_kernel<<<blocks, kThreads, 0, stream>>>(x, n, static_cast<decltype(t)*>(out));
  });
  check_cuda_launch("narrow", blocks, kThreads, stream);
}

void silu_multiply(const void* gate_up, int64_t n, int64_t width, void* out, Float type,
                   cudaStream_t stream) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    constexpr int kWide = 16 / sizeof(T);
    const auto* const from = static_cast<const T*>(gate_up);
    const auto launch = [&](auto kernel, int at_once) {
      const dim3 grid(blocks_for(width / at_once, kThreads), static_cast<unsigned>(n));
      kernel<<<grid, kThreads, 0, stream>>>(from, width, static_cast<T*>(out));
      check_cuda_launch("silu_multiply", grid, kThreads, stream);
    };
    if (width % kWide == 0) {
      launch(silu_multiply_kernel<T, kWide>, kWide);
    } else {
      launch(silu_multiply_kernel<T, 1>, 1);
    }
  });
}

void most_likely(const float* logits, int64_t n, int64_t vocab, int32_t* next, int stage,
                 Positions at, Fault* fault, cudaStream_t stream) {
  constexpr int kRowThreads = 1024;
  const unsigned blocks = static_cast<unsigned>(n);
  most_likely_kernel<<<blocks, kRowThreads, 0, stream>>>(logits, vocab, next, stage, at, fault);
  check_cuda_launch("most_likely", blocks, kRowThreads, stream);
}

}  // namespace sikv::model_kernels
