#include "apps/bench/gpu_synth.h"

#include <cuda_fp16.h>

namespace sikv::bench {
namespace {

constexpr int kRun = 32;  // tokens that share a centre
constexpr uint64_t kClusters = 64;
constexpr int kStepsPerCluster = 8;
constexpr int kThreads = 256;

// Of fill_turning_queries; period 0: queries move on every kStepsPerCluster steps.
struct Turns {
  double share;
  int period;
};

// splitmix64
__device__ inline uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

__device__ inline uint64_t mix(uint64_t a, uint64_t b) { return mix(mix(a) ^ b); }

// Two unit normals.
__device__ inline float2 normals(uint64_t seed) {
  const uint64_t bits = mix(seed);
  const float u = (static_cast<float>(bits >> 40) + 1.0f) * 0x1p-24f;
  const float v = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
  const float r = sqrtf(-2.0f * __logf(u));
  return {r * cospif(2.0f * v), r * sinpif(2.0f * v)};
}

// A head's cluster number for a draw: low ones more often.
__device__ inline uint64_t cluster(uint64_t head_seed, uint64_t draw) {
  const uint64_t bits = mix(head_seed, draw);
  return min(bits % kClusters, (bits >> 32) % kClusters);
}

// Channels 2 * pair and 2 * pair + 1 of a cluster's centre.
__device__ inline float2 centre(uint64_t head_seed, uint64_t id, int pair) {
  return normals(mix(head_seed ^ 0xc1u, id * 1024 + static_cast<uint64_t>(pair)));
}

__device__ inline uint64_t head_seed(const SynthShape& shape, int64_t b, int h) {
  return mix(shape.seed, static_cast<uint64_t>(b * shape.kv_heads + h));
}

// A thread per pair of channels.
template <bool kKeys>
__global__ void fill_rows(__half2* out, const __grid_constant__ SynthShape shape, int64_t pairs) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= pairs) return;
  const int pairs_per_row = shape.head_dim / 2;
  const int pair = static_cast<int>(i % pairs_per_row);
  const int64_t row = i / pairs_per_row;
  const int h = static_cast<int>(row % shape.kv_heads);
  const int64_t token = row / shape.kv_heads;
  const int64_t b = token / shape.tokens;
  const int t = static_cast<int>(token % shape.tokens);
  const uint64_t head = head_seed(shape, b, h);
  float2 x = normals(mix(head ^ (kKeys ? 0x4bu : 0x56u), static_cast<uint64_t>(t) * 1024 + pair));
  if (kKeys) {
    const float2 c = centre(head, cluster(head, static_cast<uint64_t>(t / kRun)), pair);
    const float2 mean = normals(mix(head ^ 0x3du, static_cast<uint64_t>(pair)));
    const float width = pair % 8 == 0 ? 4.0f : 0.5f;
    x.x = 0.8f * x.x + 0.8f * c.x + width * mean.x;
    x.y = 0.8f * x.y + 0.8f * c.y + width * mean.y;
  }
  out[i] = __floats2half2_rn(x.x, x.y);
}

// Where a head's queries look, and what they share beside it.
struct Direction {
  uint64_t cluster, shared;
};

__device__ inline Direction moving_direction(uint64_t head, int step) {
  return {cluster(head ^ 0x9fu, static_cast<uint64_t>(step / kStepsPerCluster)),
          static_cast<uint64_t>(step)};
}

// Of the last turn. Steps are a circle; a cluster comes once in it.
__device__ inline Direction turning_direction(uint64_t head, const Turns& turns, int step) {
  uint64_t last = 0;
  for (int back = 0; back < turns.period; ++back) {
    const auto at = static_cast<uint64_t>((step + turns.period - back) % turns.period);
    if (static_cast<double>(mix(head ^ 0x1000u, at) >> 40) * 0x1p-24 < turns.share) {
      last = at;
      break;
    }
  }
  return {(mix(head ^ 0x9fu) + last) % kClusters, last};
}

__global__ void fill_query_rows(__half2* out, const __grid_constant__ SynthShape shape,
                                const __grid_constant__ Turns turns, int positions, int first_step,
                                int64_t pairs) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= pairs) return;
  const int pairs_per_row = shape.head_dim / 2;
  const int pair = static_cast<int>(i % pairs_per_row);
  const int64_t row = i / pairs_per_row;
  const int query_heads = shape.kv_heads * shape.group;
  const int hq = static_cast<int>(row % query_heads);
  const int64_t position = row / query_heads;
  const int64_t b = position / positions;
  const int step = first_step + static_cast<int>(position % positions);
  const uint64_t head = head_seed(shape, b, hq / shape.group);
  const Direction direction =
      turns.period > 0 ? turning_direction(head, turns, step) : moving_direction(head, step);
  const float2 c = centre(head, direction.cluster, pair);
  const float2 shared = normals(mix(head ^ 0x71u, direction.shared * 1024 + pair));
  const float2 own = normals(mix(head ^ (0x72u + hq), static_cast<uint64_t>(step) * 1024 + pair));
  out[i] = __floats2half2_rn(0.9f * c.x + 0.5f * shared.x + 0.4f * own.x,
                             0.9f * c.y + 0.5f * shared.y + 0.4f * own.y);
}

unsigned blocks(int64_t pairs) { return static_cast<unsigned>((pairs + kThreads - 1) / kThreads); }

void launch_queries(void* q, const SynthShape& shape, const Turns& turns, int positions,
                    int first_step, cudaStream_t stream) {
  const int64_t pairs =
      int64_t{shape.batch} * positions * shape.kv_heads * shape.group * (shape.head_dim / 2);
  fill_query_rows<<<blocks(pairs), kThreads, 0, stream>>>(static_cast<__half2*>(q), shape, turns,
                                                          positions, first_step, pairs);
}

}  // namespace

void fill_keys(void* k, const SynthShape& shape, cudaStream_t stream) {
  const int64_t pairs = int64_t{shape.batch} * shape.tokens * shape.kv_heads * (shape.head_dim / 2);
  fill_rows<true><<<blocks(pairs), kThreads, 0, stream>>>(static_cast<__half2*>(k), shape, pairs);
}

void fill_values(void* v, const SynthShape& shape, cudaStream_t stream) {
  const int64_t pairs = int64_t{shape.batch} * shape.tokens * shape.kv_heads * (shape.head_dim / 2);
  fill_rows<false><<<blocks(pairs), kThreads, 0, stream>>>(static_cast<__half2*>(v), shape, pairs);
}

void fill_queries(void* q, const SynthShape& shape, int positions, int first_step,
                  cudaStream_t stream) {
  launch_queries(q, shape, {}, positions, first_step, stream);
}

void fill_turning_queries(void* q, const SynthShape& shape, double share, int period, int step,
                          cudaStream_t stream) {
  launch_queries(q, shape, {share, period}, 1, step, stream);
}

}  // namespace sikv::bench
