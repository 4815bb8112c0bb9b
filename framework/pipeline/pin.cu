// choose_pinned for all rows of a layer. Scores are computed in chunks of sequences that keep the
// scratch small, and the highest are found by a radix select on their bits: no sort.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "framework/device/cuda_error.h"
#include "framework/pipeline/pin.h"

namespace sikv {
namespace {

constexpr int kPageTokens = SIKV_PAGE_TOKENS;
constexpr int kSnapWindow = 32, kSnapPool = 7;  // as in pin.cc
constexpr int kScoreThreads = 256;
constexpr int kSelectThreads = 1024;
constexpr int kSnapTokens = 64;  // of a block: 64 fp32 keys of 256 channels fit into shared memory
constexpr uint64_t kScratchBytes = uint64_t{64} << 20;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ const T* key_address(const PinBatch& in, int b, int t, int h) {
  return static_cast<const T*>(in.keys.data) +
         (in.keys.first[b] + int64_t{t}) * in.keys.token_stride + h * in.keys.head_stride;
}
// Query head g of the group of KV head h at the w-th of the W given positions.
template <typename T>
__device__ const T* query_address(const PinBatch& in, int b, int w, int h, int g) {
  const int group = in.num_query_heads / in.num_kv_heads;
  return static_cast<const T*>(in.queries) +
         ((int64_t{b} * in.num_queries + w) * in.num_query_heads + h * group + g) * in.head_dim;
}

__device__ int whole_tokens(const PinBatch& in, int b) {
  return in.keys.count[b] / kPageTokens * kPageTokens;
}
__device__ int snap_window(const PinBatch& in, int b) {
  return min(min(kSnapWindow, in.num_queries), in.keys.count[b]);
}
// Tokens that compete.
__device__ int candidates(const PinBatch& in, int b, PinRule rule) {
  const int whole = whole_tokens(in, b);
  return rule == PinRule::kSnapKv ? min(whole, in.keys.count[b] - snap_window(in, b)) : whole;
}

// ---- last_query -------------------------------------------------------------------------------

// Whether keys can be read 16 bytes at a time.
template <typename T>
bool has_wide_keys(const PinBatch& in) {
  constexpr int64_t kPart = 16 / static_cast<int64_t>(sizeof(T));
  return reinterpret_cast<uintptr_t>(in.keys.data) % 16 == 0 && in.head_dim % kPart == 0 &&
         in.keys.token_stride % kPart == 0 && in.keys.head_stride % kPart == 0;
}

// scores [rows of the chunk, stride]. A thread per token, sums in the order of pin.cc: products in
// fp32, their sum in fp64. kWide: 16 bytes at a time, as every lane reads a line of its own.
template <typename T, bool kWide>
__global__ void last_query_scores(const __grid_constant__ PinBatch in, int first_row,
                                  double* scores, int64_t stride) {
  extern __shared__ float mean[];
  const int row = first_row + blockIdx.y, b = row / in.num_kv_heads, h = row % in.num_kv_heads;
  const int group = in.num_query_heads / in.num_kv_heads;
  for (int d = threadIdx.x; d < in.head_dim; d += kScoreThreads) {
    float sum = 0;
    for (int g = 0; g < group; ++g) {
      const float q = to_float(query_address<T>(in, b, in.num_queries - 1, h, g)[d]);
      sum = __fadd_rn(sum, __fdiv_rn(q, static_cast<float>(group)));
    }
    mean[d] = sum;
  }
  __syncthreads();
  const int t = blockIdx.x * kScoreThreads + threadIdx.x;
  if (t >= whole_tokens(in, b)) return;
  constexpr int kPart = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;
  using Part = std::conditional_t<kWide, uint4, T>;
  const auto* const key = reinterpret_cast<const Part*>(key_address<T>(in, b, t, h));
  double sum = 0;
  for (int part = 0; part < in.head_dim / kPart; ++part) {
    const Part bytes = key[part];
    const T* const x = reinterpret_cast<const T*>(&bytes);
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const float product = __fmul_rn(to_float(x[i]), mean[part * kPart + i]);
      sum = __dadd_rn(sum, static_cast<double>(product));
    }
  }
  scores[blockIdx.y * stride + t] = sum;
}

// ---- snapkv -----------------------------------------------------------------------------------

struct SoftmaxPart {
  float top, sum;
};

// Visits the logits of this thread's token for every query of the window:
// visit(query number, w, logit). The block's keys lie in shared memory, padded by a word so that
// neighbours do not share a bank.
template <typename T, typename Visit>
__device__ void for_each_logit(const PinBatch& in, int b, int h, int t, Visit&& visit) {
  extern __shared__ float shared[];
  const int D = in.head_dim, group = in.num_query_heads / in.num_kv_heads;
  const int window = snap_window(in, b), prompt = in.keys.count[b];
  float* const query = shared;
  T* const keys = reinterpret_cast<T*>(shared + D);
  const int key_stride = D + static_cast<int>(sizeof(float) / sizeof(T));
  const int first = t - threadIdx.x;
  for (int i = threadIdx.x; i < kSnapTokens * D; i += kSnapTokens) {
    const int token = first + i / D;
    if (token < prompt) keys[i / D * key_stride + i % D] = key_address<T>(in, b, token, h)[i % D];
  }
  for (int n = 0; n < window * group; ++n) {
    const int w = n / group;
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += kSnapTokens) {
      query[d] = to_float(query_address<T>(in, b, in.num_queries - window + w, h, n % group)[d]);
    }
    __syncthreads();
    float dot = 0;
    for (int d = 0; d < D; ++d) dot += to_float(keys[threadIdx.x * key_stride + d]) * query[d];
    visit(n, w, dot * in.scale);
  }
}

// parts [H, queries, blocks]: largest logit and sum of a block's tokens that query n sees.
template <typename T>
__global__ void snap_softmax_parts(const __grid_constant__ PinBatch in, int b, int queries,
                                   SoftmaxPart* parts) {
  const int h = blockIdx.y, t = blockIdx.x * kSnapTokens + threadIdx.x;
  const int prompt = in.keys.count[b], window = snap_window(in, b);
  __shared__ SoftmaxPart warps[kSnapTokens / 32];
  for_each_logit<T>(in, b, h, t, [&](int n, int w, float logit) {
    const bool seen = t < prompt - window + w + 1;
    float top = seen ? logit : -INFINITY;
    for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    float sum = seen ? expf(logit - top) : 0;
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = {top, sum};
    __syncthreads();
    if (threadIdx.x == 0) {
      SoftmaxPart all{fmaxf(warps[0].top, warps[1].top), 0};
      for (const SoftmaxPart& warp : warps) {
        if (warp.sum > 0) all.sum += warp.sum * expf(warp.top - all.top);
      }
      parts[(int64_t{h} * queries + n) * gridDim.x + blockIdx.x] = all;
    }
  });
}

// One warp per (query, head): its parts into the first.
__global__ void merge_softmax_parts(SoftmaxPart* parts, int blocks) {
  SoftmaxPart* const own = parts + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * blocks;
  float top = -INFINITY;
  for (int i = threadIdx.x; i < blocks; i += 32) top = fmaxf(top, own[i].top);
  for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
  float sum = 0;
  for (int i = threadIdx.x; i < blocks; i += 32) {
    if (own[i].sum > 0) sum += own[i].sum * expf(own[i].top - top);
  }
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  __syncwarp();
  if (threadIdx.x == 0) own[0] = {top, sum};
}

// sums [H, stride]: attention that a token gets from all queries of the window and the group.
template <typename T>
__global__ void snap_sums(const __grid_constant__ PinBatch in, int b, int queries,
                          const SoftmaxPart* parts, double* sums, int64_t stride) {
  const int h = blockIdx.y, t = blockIdx.x * kSnapTokens + threadIdx.x;
  double sum = 0;
  for_each_logit<T>(in, b, h, t, [&](int n, int, float logit) {
    const SoftmaxPart all = parts[(int64_t{h} * queries + n) * gridDim.x];
    sum += expf(logit - all.top) / all.sum;
  });
  if (t < candidates(in, b, PinRule::kSnapKv)) sums[h * stride + t] = sum;
}

__global__ void snap_pool(const __grid_constant__ PinBatch in, int b, const double* sums,
                          double* scores, int64_t stride) {
  const int h = blockIdx.y, t = blockIdx.x * kScoreThreads + threadIdx.x;
  const int n = candidates(in, b, PinRule::kSnapKv);
  if (t >= n) return;
  double top = 0;
  for (int i = max(0, t - kSnapPool / 2); i < min(n, t + kSnapPool / 2 + 1); ++i) {
    top = fmax(top, sums[h * stride + i]);
  }
  scores[h * stride + t] = top;
}

// ---- the highest scores -----------------------------------------------------------------------

// Larger score, larger key; -0 and 0 are one.
__device__ uint64_t sort_key(double score) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(score + 0.0));
  return (bits >> 63) != 0 ? ~bits : bits | uint64_t{1} << 63;
}

// The bin that holds the wanted-th highest of the counted keys, and how many of it are wanted. One
// warp, 8 bins a lane from the top.
__device__ int2 find_bin(const int* bins, int wanted) {
  const int lane = threadIdx.x % 32, first = 255 - 8 * lane;
  int own = 0;
  for (int i = 0; i < 8; ++i) own += bins[first - i];
  int through = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int higher = __shfl_up_sync(~0u, through, distance);
    if (lane >= distance) through += higher;
  }
  const uint32_t reached = __ballot_sync(~0u, through >= wanted);
  const int owner = __ffs(static_cast<int>(reached)) - 1;
  int2 found = {first, wanted - (through - own)};
  if (lane == owner) {
    for (; bins[found.x] < found.y; --found.x) found.y -= bins[found.x];
  }
  return {__shfl_sync(~0u, found.x, owner), __shfl_sync(~0u, found.y, owner)};
}

// One block per row. Narrows the key of the last score that is kept byte by byte, then keeps what
// lies above it and, of its equals, the lowest positions.
__global__ void __launch_bounds__(kSelectThreads)
    select_highest(const __grid_constant__ PinBatch in, PinRule rule, int pinned, int first_row,
                   const double* scores, int64_t stride) {
  constexpr int kWarps = kSelectThreads / 32;
  __shared__ int bins[256];
  __shared__ int2 shared_bin;
  __shared__ int2 warp_counts[kWarps];  // above the last key, equal to it
  const int row = first_row + blockIdx.x, b = row / in.num_kv_heads;
  const int n = max(0, candidates(in, b, rule));
  const double* const own = scores + blockIdx.x * stride;
  int32_t* const slots = in.slots + int64_t{row} * pinned;
  int wanted = min(pinned, n);
  if (threadIdx.x == 0) in.len[row] = wanted;
  if (wanted == 0) return;
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kSelectThreads) bins[i] = 0;
    __syncthreads();
    for (int t = threadIdx.x; t < n; t += kSelectThreads) {
      const uint64_t key = sort_key(own[t]);
      if (shift == 56 || key >> (shift + 8) == prefix) atomicAdd(&bins[key >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const int2 found = find_bin(bins, wanted);
      if (threadIdx.x == 0) shared_bin = found;
    }
    __syncthreads();
    prefix = prefix << 8 | static_cast<uint64_t>(shared_bin.x);
    wanted = shared_bin.y;
  }
  // A warp has neighbouring tokens and counts them before it places them.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = (n + kSelectThreads - 1) / kSelectThreads * 32;
  const int begin = min(warp * share, n), end = min(begin + share, n);
  const auto visit = [&](auto&& body) {
    for (int first = begin; first < end; first += 32) {
      const int t = first + lane;
      const uint64_t key = t < end ? sort_key(own[t]) : 0;
      body(t, __ballot_sync(~0u, t < end && key > prefix),
           __ballot_sync(~0u, t < end && key == prefix));
    }
  };
  int2 counts = {0, 0};
  visit([&](int, uint32_t above, uint32_t equal) {
    counts.x += __popc(above), counts.y += __popc(equal);
  });
  if (lane == 0) warp_counts[warp] = counts;
  __syncthreads();
  const int2 before = lane < warp ? warp_counts[lane] : int2{0, 0};
  int all_above = __reduce_add_sync(~0u, before.x), all_equal = __reduce_add_sync(~0u, before.y);
  const uint32_t lower = (1u << lane) - 1u;
  visit([&](int t, uint32_t above, uint32_t equal) {
    const int equals = all_equal + __popc(equal & lower);
    if ((above >> lane & 1u) != 0 || ((equal >> lane & 1u) != 0 && equals < wanted)) {
      slots[all_above + __popc(above & lower) + min(equals, wanted)] = t;
    }
    all_above += __popc(above), all_equal += __popc(equal);
  });
}

__global__ void pin_first(const __grid_constant__ PinBatch in, int pinned) {
  const int row = blockIdx.x, b = row / in.num_kv_heads;
  const int n = min(pinned, whole_tokens(in, b));
  for (int i = threadIdx.x; i < n; i += kScoreThreads) in.slots[int64_t{row} * pinned + i] = i;
  if (threadIdx.x == 0) in.len[row] = n;
}

// ---- host -------------------------------------------------------------------------------------

unsigned blocks_for(int64_t n, int per_block) {
  return static_cast<unsigned>((n + per_block - 1) / per_block);
}

template <typename T>
void choose_last_query(int pinned, const PinBatch& in, Device& device, cudaStream_t stream) {
  const int H = in.num_kv_heads;
  const int64_t stride = std::max(in.keys.max_count, 1);
  const auto sequence_bytes = static_cast<uint64_t>(H * stride) * sizeof(double);
  const int at_once = static_cast<int>(std::clamp<uint64_t>(
      kScratchBytes / sequence_bytes, 1, static_cast<uint64_t>(in.num_sequences)));
  const DeviceBuffer scores(device, sequence_bytes * static_cast<uint64_t>(at_once));
  for (int b = 0; b < in.num_sequences; b += at_once) {
    const unsigned rows = static_cast<unsigned>(std::min(at_once, in.num_sequences - b) * H);
    const dim3 grid(blocks_for(stride, kScoreThreads), rows);
    const auto kernel =
        has_wide_keys<T>(in) ? last_query_scores<T, true> : last_query_scores<T, false>;
    kernel<<<grid, kScoreThreads, static_cast<size_t>(in.head_dim) * sizeof(float), stream>>>(
        in, b * H, scores.as<double>(), stride);
    check_cuda_launch("last_query_scores", grid, kScoreThreads, stream);
    select_highest<<<rows, kSelectThreads, 0, stream>>>(in, PinRule::kLastQuery, pinned, b * H,
                                                        scores.as<double>(), stride);
    check_cuda_launch("select_highest", rows, kSelectThreads, stream);
  }
  device.synchronize();
}

template <typename T>
void choose_snapkv(int pinned, const PinBatch& in, Device& device, cudaStream_t stream) {
  const unsigned H = static_cast<unsigned>(in.num_kv_heads);
  const int64_t stride = std::max(in.keys.max_count, 1);
  const int queries =
      std::min(kSnapWindow, in.num_queries) * (in.num_query_heads / in.num_kv_heads);
  const unsigned blocks = blocks_for(stride, kSnapTokens);
  const DeviceBuffer parts(device, sizeof(SoftmaxPart) * H * static_cast<size_t>(queries) * blocks);
  const DeviceBuffer sums(device, H * static_cast<size_t>(stride) * sizeof(double));
  const DeviceBuffer scores(device, sums.bytes());
  const size_t D = static_cast<size_t>(in.head_dim);
  const size_t shared = D * sizeof(float) + kSnapTokens * (D * sizeof(T) + sizeof(float));
  for (auto kernel : {reinterpret_cast<const void*>(snap_softmax_parts<T>),
                      reinterpret_cast<const void*>(snap_sums<T>)}) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)),
               "shared memory for the snapkv scores");
  }
  const dim3 grid(blocks, H);
  for (int b = 0; b < in.num_sequences; ++b) {
    snap_softmax_parts<T>
        <<<grid, kSnapTokens, shared, stream>>>(in, b, queries, parts.as<SoftmaxPart>());
    merge_softmax_parts<<<dim3(static_cast<unsigned>(queries), H), 32, 0, stream>>>(
        parts.as<SoftmaxPart>(), static_cast<int>(blocks));
    snap_sums<T><<<grid, kSnapTokens, shared, stream>>>(in, b, queries, parts.as<SoftmaxPart>(),
                                                        sums.as<double>(), stride);
    const dim3 pool(blocks_for(stride, kScoreThreads), H);
    snap_pool<<<pool, kScoreThreads, 0, stream>>>(in, b, sums.as<double>(), scores.as<double>(),
                                                  stride);
    select_highest<<<H, kSelectThreads, 0, stream>>>(
        in, PinRule::kSnapKv, pinned, b * in.num_kv_heads, scores.as<double>(), stride);
    check_cuda_launch("snapkv scores", grid, kSnapTokens, stream);
  }
  device.synchronize();
}

template <typename T>
void choose(PinRule rule, int pinned, const PinBatch& in, Device& device, cudaStream_t stream) {
  if (rule == PinRule::kSnapKv) {
    choose_snapkv<T>(pinned, in, device, stream);
  } else {
    choose_last_query<T>(pinned, in, device, stream);
  }
}

}  // namespace

void choose_pinned_on_gpu(PinRule rule, int pinned, const PinBatch& in, Device& device) {
  check_pin_queries(rule, in.num_queries);
  const auto stream = static_cast<cudaStream_t>(device.stream());
  if (rule == PinRule::kFirst) {
    const unsigned rows = static_cast<unsigned>(in.num_sequences * in.num_kv_heads);
    pin_first<<<rows, kScoreThreads, 0, stream>>>(in, pinned);
    check_cuda_launch("pin_first", rows, kScoreThreads, stream);
    return;
  }
  switch (in.keys.dtype) {
    case SIKV_FP32:
      return choose<float>(rule, pinned, in, device, stream);
    case SIKV_BF16:
      return choose<__nv_bfloat16>(rule, pinned, in, device, stream);
    default:
      return choose<__half>(rule, pinned, in, device, stream);
  }
}

}  // namespace sikv
