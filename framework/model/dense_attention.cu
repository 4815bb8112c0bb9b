// Causal attention of a prompt's chunk. fp16 goes through the tensor cores: a block takes 128
// queries of one head, a warp 16 of them, and goes through the keys by 64 with two tiles in shared
// memory, so that one is fetched while the other is used. fp32, which tests and exact runs take,
// is a warp per query.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "framework/device/cuda_error.h"
#include "framework/model/model_kernels.h"

namespace sikv::model_kernels {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarps = 8, kWarpRows = 16, kRows = kWarps * kWarpRows, kKeys = 64;
// Halves beside each row in shared memory: the 8 rows of a matrix load then lie in 8 groups of
// banks.
constexpr int kPad = 8;

struct Shape {
  int64_t first;  // position of the first query
  int n, query_heads, kv_heads;
  float scale;  // of scores, times log2(e)
};

__device__ void store(void* out, Float type, int64_t i, float x) {
  switch (type) {
    case Float::kFp32:
      static_cast<float*>(out)[i] = x;
      break;
    case Float::kFp16:
      static_cast<__half*>(out)[i] = __float2half(x);
      break;
    case Float::kBf16:
      static_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16(x);
      break;
  }
}

__device__ unsigned shared_address(const void* data) {
  return static_cast<unsigned>(__cvta_generic_to_shared(data));
}

// Four 8x8 matrices; lanes 8 i .. 8 i + 7 name the rows of matrix i.
__device__ void load_matrices(unsigned (&to)[4], const __half* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

__device__ void load_transposed(unsigned (&to)[4], const __half* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// c [16, 8] += a [16, 16] . b [16, 8]
__device__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ unsigned packed(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

// Rows [from, from + kCount) of a head to shared memory; zeros behind `end`.
template <int kCount, int D>
__device__ void fetch(const __half* data, int64_t stride, int64_t from, int64_t end, __half* to) {
  constexpr int kPieces = D / 8;  // of 16 bytes
  for (int i = threadIdx.x; i < kCount * kPieces; i += kWarps * kWarp) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool there = from + row < end;
    const __half* const source = data + (there ? from + row : 0) * stride + piece * 8;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     shared_address(to + row * (D + kPad) + piece * 8)),
                 "l"(source), "r"(there ? 16 : 0));
  }
}

__device__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

template <int D>
constexpr size_t shared_bytes() {
  return sizeof(__half) * (kRows + 4 * kKeys) * (D + kPad);
}

template <int D>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    attend_fp16(const __half* q, const __half* k, const __half* v, Shape shape, void* out,
                Float out_type) {
  constexpr int kRow = D + kPad;
  extern __shared__ __align__(16) __half tiles[];
  __half* const query_tile = tiles;
  __half* const key_tiles = tiles + kRows * kRow;
  __half* const value_tiles = key_tiles + 2 * kKeys * kRow;

  const int head = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int kv_head = head / (shape.query_heads / shape.kv_heads);
  // The blocks with the most keys go first.
  const int from = (static_cast<int>(gridDim.y) - 1 - static_cast<int>(blockIdx.y)) * kRows;
  const int64_t q_stride = int64_t{shape.query_heads} * D, kv_stride = int64_t{shape.kv_heads} * D;
  const int64_t end = shape.first + min(from + kRows, shape.n);
  const __half* const head_k = k + int64_t{kv_head} * D;
  const __half* const head_v = v + int64_t{kv_head} * D;
  const int tiles_of_keys = static_cast<int>((end + kKeys - 1) / kKeys);

  fetch<kRows, D>(q + int64_t{head} * D, q_stride, from, shape.n, query_tile);
  fetch<kKeys, D>(head_k, kv_stride, 0, end, key_tiles);
  fetch<kKeys, D>(head_v, kv_stride, 0, end, value_tiles);
  commit();

  // Rows of this thread within the warp's 16: lane / 4 and that + 8; columns 2 (lane % 4), + 1.
  const int row = warp * kWarpRows + lane / 4;
  const int64_t position = shape.first + from + row;
  float sums[D / 8][4] = {};  // out, not yet divided
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const __half* const query_rows =
      query_tile + (warp * kWarpRows + lane % 16) * kRow + lane / 16 * 8;
  const int key_row = lane / 16 * 8 + lane % 8, key_column = lane / 8 % 2 * 8;
  const int value_row = lane % 16, value_column = lane / 16 * 8;

  for (int tile = 0; tile < tiles_of_keys; ++tile) {
    const int64_t key = int64_t{tile} * kKeys;
    const __half* const keys = key_tiles + tile % 2 * kKeys * kRow;
    const __half* const values = value_tiles + tile % 2 * kKeys * kRow;
    if (tile + 1 < tiles_of_keys) {
      fetch<kKeys, D>(head_k, kv_stride, key + kKeys, end,
                      key_tiles + (tile + 1) % 2 * kKeys * kRow);
      fetch<kKeys, D>(head_v, kv_stride, key + kKeys, end,
                      value_tiles + (tile + 1) % 2 * kKeys * kRow);
    }
    commit();
    wait<1>();
    __syncthreads();

    float scores[kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      unsigned a[4];
      load_matrices(a, query_rows + d);
#pragma unroll
      for (int j = 0; j < kKeys; j += 16) {
        unsigned b[4];
        load_matrices(b, keys + (j + key_row) * kRow + d + key_column);
        multiply_add(scores[j / 8], a, b[0], b[1]);
        multiply_add(scores[j / 8 + 1], a, b[2], b[3]);
      }
    }
    if (key + kKeys >
        shape.first + from + warp * kWarpRows + 1) {  // the warp's first row ends here
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (key + j * 8 + lane % 4 * 2 + c % 2 > position + c / 2 * 8) scores[j][c] = -INFINITY;
        }
      }
    }
    // Every row sees key 0, so that `highest` is finite from the first tile on.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = highest[r];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
        most = fmaxf(most, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
      const float fade = exp2f((highest[r] - most) * shape.scale);
      highest[r] = most;
      total[r] *= fade;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        sums[j][2 * r] *= fade;
        sums[j][2 * r + 1] *= fade;
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          scores[j][c] = exp2f((scores[j][c] - most) * shape.scale);
          total[r] += scores[j][c];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys; j += 16) {
      // Where the accumulators of two score tiles lie is where the multiplication wants them.
      const unsigned a[4] = {packed(scores[j / 8][0], scores[j / 8][1]),
                             packed(scores[j / 8][2], scores[j / 8][3]),
                             packed(scores[j / 8 + 1][0], scores[j / 8 + 1][1]),
                             packed(scores[j / 8 + 1][2], scores[j / 8 + 1][3])};
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        unsigned b[4];
        load_transposed(b, values + (j + value_row) * kRow + d + value_column);
        multiply_add(sums[d / 8], a, b[0], b[1]);
        multiply_add(sums[d / 8 + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = total[r];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    const int query = from + row + r * 8;
    if (query >= shape.n) continue;
    const int64_t to = query * q_stride + int64_t{head} * D + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      store(out, out_type, to + j * 8, sums[j][2 * r] / sum);
      store(out, out_type, to + j * 8 + 1, sums[j][2 * r + 1] / sum);
    }
  }
}

// A block per query, a warp per head in turn.
__global__ void attend_fp32(const float* q, const float* k, const float* v, Shape shape,
                            int head_dim, void* out, Float out_type) {
  constexpr int kPerLane = 8;  // of up to 256 channels
  const int lane = threadIdx.x % kWarp;
  const int64_t query = blockIdx.x, kv_stride = int64_t{shape.kv_heads} * head_dim;
  for (int head = threadIdx.x / kWarp; head < shape.query_heads; head += blockDim.x / kWarp) {
    const int64_t at = (query * shape.query_heads + head) * head_dim;
    const int64_t kv_at = int64_t{head / (shape.query_heads / shape.kv_heads)} * head_dim;
    float own[kPerLane] = {}, sums[kPerLane] = {}, highest = -INFINITY, total = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (lane + j * kWarp < head_dim) own[j] = q[at + lane + j * kWarp];
    }
    for (int64_t key = 0; key <= shape.first + query; ++key) {
      const float* const key_k = k + key * kv_stride + kv_at;
      const float* const key_v = v + key * kv_stride + kv_at;
      float score = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (lane + j * kWarp < head_dim) score += own[j] * key_k[lane + j * kWarp];
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        score += __shfl_xor_sync(kFullWarp, score, offset);
      }
      const float most = fmaxf(highest, score);
      const float fade = exp2f((highest - most) * shape.scale);
      const float weight = exp2f((score - most) * shape.scale);
      highest = most;
      total = total * fade + weight;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (lane + j * kWarp < head_dim)
          sums[j] = sums[j] * fade + weight * key_v[lane + j * kWarp];
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (lane + j * kWarp < head_dim) store(out, out_type, at + lane + j * kWarp, sums[j] / total);
    }
  }
}

template <int D>
void launch_fp16(const void* q, const void* k, const void* v, const Shape& shape, void* out,
                 Float out_type, cudaStream_t stream) {
  static const cudaError_t raised =
      cudaFuncSetAttribute(attend_fp16<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes<D>()));
  check_cuda(raised, "shared memory of dense attention");
  const dim3 grid(static_cast<unsigned>(shape.query_heads),
                  static_cast<unsigned>((shape.n + kRows - 1) / kRows));
  attend_fp16<D><<<grid, kWarps * kWarp, shared_bytes<D>(), stream>>>(
      static_cast<const __half*>(q), static_cast<const __half*>(k), static_cast<const __half*>(v),
      shape, out, out_type);
  check_cuda_launch("attend_fp16", grid, kWarps * kWarp, stream);
}

}  // namespace

bool attention_takes(int head_dim, Float cache_type) {
  if (cache_type == Float::kFp32) return head_dim <= 256;
  return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

void dense_attention(const void* q, const void* k, const void* v, Float cache_type, int64_t first,
                     int64_t n, int query_heads, int kv_heads, int head_dim, void* out,
                     Float out_type, cudaStream_t stream) {
  constexpr float kLog2E = 1.44269504f;
  const Shape shape{first, static_cast<int>(n), query_heads, kv_heads,
                    kLog2E / std::sqrt(static_cast<float>(head_dim))};
  if (cache_type == Float::kFp32) {
    const unsigned blocks = static_cast<unsigned>(n);
    attend_fp32<<<blocks, kWarps * kWarp, 0, stream>>>(
        static_cast<const float*>(q), static_cast<const float*>(k), static_cast<const float*>(v),
        shape, head_dim, out, out_type);
    check_cuda_launch("attend_fp32", blocks, kWarps * kWarp, stream);
    return;
  }
  const auto launch = head_dim == 64    ? launch_fp16<64>
                      : head_dim == 96  ? launch_fp16<96>
                      : head_dim == 128 ? launch_fp16<128>
                                        : launch_fp16<256>;
  launch(q, k, v, shape, out, out_type, stream);
}

}  // namespace sikv::model_kernels
