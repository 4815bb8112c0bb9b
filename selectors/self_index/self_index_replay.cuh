// What a selector learns from the last queries of a prompt: the mean that refresh_cosine measures
// turns from, and for schedule: auto the longest period whose replay drops little (the definition
// is self_index_schedule.cc). Up to 48 queries at a time:
//
//   scan -> candidates of every query; exact logits -> softmax sums, and once more -> probabilities;
//   mass kept at every period
//
// Logits are products of the tensor cores, made twice rather than written: at 32K tokens of 8 KV
// heads of 4 query heads those of 48 queries would be 200 MB, probabilities are 50.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_REPLAY_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_REPLAY_CUH_

#include <cub/block/block_reduce.cuh>

#include "kernels/common/warp_mma.cuh"
#include "selectors/self_index/self_index_args.cuh"
#include "selectors/self_index/self_index_softmax.cuh"
#include "selectors/self_index/self_index_team.cuh"

namespace sikv::self_index {

// Position in the prompt of a pass's query.
__device__ inline int replay_position(const ReplayArgs& args, int sequence, int query) {
  return args.step.prompt_len[sequence] - args.num_queries + args.first_query + query;
}

// Rows of keys or queries in shared memory: four neighbours more than D, so that the 16-byte reads
// of a quarter warp touch every bank once.
template <int D>
inline constexpr int kAttendStride = D + 4;

inline constexpr int kWarpTokens = 32;  // of a warp, in tiles of 8

template <int D>
constexpr int attend_shared_bytes(int query_tiles) {
  return (attend_tokens(D) + kQueryTile * query_tiles) * kAttendStride<D> *
         static_cast<int>(sizeof(float));
}

// rows [count, D] of an input dtype -> shared memory, zeros behind them up to `padded` rows. stride:
// elements. All threads of a block, no barrier.
template <int D>
__device__ void load_rows(const void* data, int32_t dtype, int64_t stride, int count, int padded,
                          float* out) {
  constexpr int kUnits = D / cuda::kUnit;
  for (int i = threadIdx.x; i < padded * kUnits; i += blockDim.x) {
    const int row = i / kUnits, unit = i % kUnits;
    float x[cuda::kUnit] = {};
    if (row < count) {
      cuda::load_raw_unit(
          static_cast<const std::byte*>(data) + row * stride * sikv_dtype_bytes(dtype), dtype, unit,
          x);
    }
    auto* to = reinterpret_cast<float4*>(out + row * kAttendStride<D> + unit * cuda::kUnit);
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
  }
}

// logits [4 tiles of 8 tokens] = C fragments of 16 queries x 8 tokens, of a warp. The products of 32
// channels are added outside the tensor cores, which truncate. kSplit: of fp32 inputs.
template <int D, bool kSplit>
__device__ void multiply(const float* queries, const float* keys, float (&logits)[4][4]) {
  const int lane = threadIdx.x % 32;
  // k of the products is any order of channels: a lane takes 8 neighbouring ones.
  const float* query = queries + lane / 4 * kAttendStride<D> + lane % 4 * 8;
  const float* key = keys + lane / 4 * kAttendStride<D> + lane % 4 * 8;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[t][i] = 0.0f;
  }
#pragma unroll 1
  for (int channel = 0; channel < D; channel += 32) {
    float sums[4][4] = {};
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
      const auto quad = [&](const float* row) {
        return *reinterpret_cast<const float4*>(row + channel + half);
      };
      const float4 upper = quad(query), lower = quad(query + 8 * kAttendStride<D>);
      const float a[2][4] = {{upper.x, lower.x, upper.y, lower.y},
                             {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const float4 k = quad(key + 8 * t * kAttendStride<D>);
        const float2 b[2] = {{k.x, k.y}, {k.z, k.w}};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if constexpr (kSplit) {
            float a_high[4], a_low[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              a_high[i] = cuda::of_tf32(a[s][i]);
              a_low[i] = a[s][i] - a_high[i];
            }
            const float2 b_high = {cuda::of_tf32(b[s].x), cuda::of_tf32(b[s].y)};
            const float2 b_low = {b[s].x - b_high.x, b[s].y - b_high.y};
            cuda::mma_tf32(sums[t], a_low, b_high);
            cuda::mma_tf32(sums[t], a_high, b_low);
            cuda::mma_tf32(sums[t], a_high, b_high);
          } else {
            cuda::mma_tf32(sums[t], a[s], b[s]);
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[t][i] += sums[t][i];
    }
  }
}

// The softmax sums of a block's tokens (kSums), or their probabilities, for every query of the pass.
// grid (blocks, rows), a warp for 16 queries and 32 tokens
template <int D, bool kSplit, bool kSums>
__global__ void __launch_bounds__(attend_tokens(D) / kWarpTokens * 32 * kPassQueries / kQueryTile)
    replay_attend(const __grid_constant__ ReplayArgs args) {
  constexpr int kTokens = attend_tokens(D), kTokenGroups = kTokens / kWarpTokens;
  const sikv_cache_view& view = args.view;
  const int row = args.pass.row(), sequence = row / view.num_kv_heads, group = args.step.group;
  const int first = static_cast<int>(blockIdx.x) * kTokens;
  const int num_queries = args.pass.num_queries;
  const int first_position = replay_position(args, sequence, 0);
  const int end = min(first_position + num_queries, args.keys.count[sequence]);
  if (first >= end) return;
  extern __shared__ uint4 dynamic[];
  __shared__ float2 parts[kTokenGroups][kPassQueries];
  float* keys = reinterpret_cast<float*>(dynamic);
  float* queries = keys + kTokens * kAttendStride<D>;
  const int64_t key = (int64_t{args.keys.first[sequence]} + first) * args.keys.token_stride +
                      row % view.num_kv_heads * args.keys.head_stride;
  load_rows<D>(
      static_cast<const std::byte*>(args.keys.data) + key * sikv_dtype_bytes(args.keys.dtype),
      args.keys.dtype, args.keys.token_stride, min(end - first, kTokens), kTokens, keys);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_query = warp / kTokenGroups * kQueryTile;
  const int warp_token = warp % kTokenGroups * kWarpTokens;
  const int padded = static_cast<int>(blockDim.x) / 32 / kTokenGroups * kQueryTile;
  const int my_query = warp_query + lane / 4;              // and the one 8 behind
  const int my_token = first + warp_token + lane % 4 * 2;  // and its neighbour, of each tile
  const float scale = args.step.scale * 1.4426950408889634f;
  float probability[4][4] = {};
  for (int head = 0; head < group; ++head) {
    const int64_t query = first_query(args.step, view, row) + int64_t{head} * D;
    load_rows<D>(static_cast<const std::byte*>(args.step.q) + query * sikv_dtype_bytes(view.dtype),
                 view.dtype, args.step.query_stride, num_queries, padded, queries);
    __syncthreads();
    float logits[4][4];
    multiply<D, kSplit>(queries + warp_query * kAttendStride<D>,
                        keys + warp_token * kAttendStride<D>, logits);
    const int64_t place = int64_t{blockIdx.y} * group + head;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = first_position + my_query + 8 * half;
      if constexpr (kSums) {
        SoftmaxSum sum;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const int token = my_token + 8 * t;
          const auto seen = [&](int i) {
            return token + i <= position ? scale * logits[t][2 * half + i] : -INFINITY;
          };
          sum.add(seen(0), seen(1));
        }
        sum.merge_lanes(1);
        sum.merge_lanes(2);
        if (lane % 4 == 0) parts[warp % kTokenGroups][my_query + 8 * half] = sum.pair();
      } else {
        const float2 weight =
            args.weights[place * kPassQueries + min(my_query + 8 * half, num_queries - 1)];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float logit = scale * logits[t][2 * half + i];
            probability[t][2 * half + i] += exp2f(logit - weight.x) * weight.y;
          }
        }
      }
    }
    __syncthreads();
    if constexpr (kSums) {
      if (static_cast<int>(threadIdx.x) < num_queries) {
        SoftmaxSum sum;
        for (int g = 0; g < kTokenGroups; ++g) sum.merge(parts[g][threadIdx.x]);
        args.sums[(place * args.blocks + blockIdx.x) * kPassQueries + threadIdx.x] = sum.pair();
      }
    }
  }
  if constexpr (!kSums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = my_query + 8 * half;
      if (query >= num_queries) continue;
      float* out = args.probability + int64_t{args.pass.list(query)} * args.most_tokens;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = my_token + 8 * t + i;
          if (token <= first_position + query) out[token] = probability[t][2 * half + i];
        }
      }
    }
  }
}

inline constexpr int kSumSlices = 16;

// grid (G, rows), kPassQueries x kSumSlices threads
template <int kTokens>
__global__ void __launch_bounds__(kPassQueries* kSumSlices)
    replay_weights(const __grid_constant__ ReplayArgs args) {
  const int group = args.step.group, query = threadIdx.x, slice = threadIdx.y;
  const int position = replay_position(args, args.pass.row() / args.view.num_kv_heads, query);
  const int64_t place = int64_t{blockIdx.y} * group + blockIdx.x;
  __shared__ float2 parts[kSumSlices][kPassQueries];
  SoftmaxSum sum;
  if (query < args.pass.num_queries) {
    for (int block = slice; block * kTokens <= position; block += kSumSlices) {
      sum.merge(args.sums[(place * args.blocks + block) * kPassQueries + query]);
    }
  }
  parts[slice][query] = sum.pair();
  __syncthreads();
  if (slice > 0 || query >= args.pass.num_queries) return;
  for (int other = 1; other < kSumSlices; ++other) sum.merge(parts[other][query]);
  args.weights[place * kPassQueries + query] = {sum.highest,
                                                1.0f / (static_cast<float>(group) * sum.sum)};
}

// grid (periods, rows, queries)
__global__ void __launch_bounds__(kReplayThreads)
    replay_kept(const __grid_constant__ ReplayArgs args) {
  const sikv_cache_view& view = args.view;
  const int j = blockIdx.x, row = args.pass.row(), sequence = row / view.num_kv_heads;
  if (args.keys.count[sequence] == 0) return;
  const int query = args.pass.query(), position = replay_position(args, sequence, query);
  __shared__ uint32_t histogram[kRadixBins];
  __shared__ SelectScratch<kReplayThreads> select;
  __shared__ typename cub::BlockReduce<double, kReplayThreads>::TempStorage reduce;

  // Of the last query that was scanned for.
  const int scanned = args.pass.list(query & -(1 << j));
  const int32_t* list = args.candidates + int64_t{scanned} * args.capacity;
  // Tokens not yet seen are dropped; the list ascends.
  int seen = 0, end = args.found[scanned];
  while (seen < end) {
    const int middle = (seen + end) / 2;
    if (list[middle] <= position) {
      seen = middle + 1;
    } else {
      end = middle;
    }
  }
  const float* probability = args.probability + int64_t{args.pass.list(query)} * args.most_tokens;
  const int always_from =
      min(view.encoded_len[row], args.step.prompt_len[sequence] - args.num_queries);
  const int64_t budget = row_budget(args.step, view, row);
  const auto key_at = [&](int i) { return __float_as_uint(probability[list[i]]) + 1; };
  Cut cut{0, 0};
  if (budget <= 0) {
    seen = 0;
  } else if (seen > budget) {
    Team alone(nullptr, 0, 0, 1);
    cut = find_radix_cut<kReplayThreads>(alone, key_at, seen, static_cast<uint32_t>(budget),
                                         histogram, select);
  }
  double mass = 0.0;
  int ties = 0;  // below always_from; the first of all ties, so that as many as fit are kept
  for (int i = threadIdx.x; i < seen; i += kReplayThreads) {
    if (list[i] >= always_from) continue;
    const uint32_t key = key_at(i);
    if (key > cut.key) mass += probability[list[i]];
    ties += key == cut.key ? 1 : 0;
  }
  const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  for (int i = threadIdx.x; i < view.pinned_len[row]; i += kReplayThreads) {
    if (pinned[i] < always_from && pinned[i] <= position) mass += probability[pinned[i]];
  }
  for (int slot = always_from + threadIdx.x; slot <= position; slot += kReplayThreads) {
    mass += probability[slot];
  }
  using Reduce = cub::BlockReduce<double, kReplayThreads>;
  const double total = Reduce(reduce).Sum(mass);
  __syncthreads();
  const double all_ties = Reduce(reduce).Sum(static_cast<double>(ties));
  if (threadIdx.x == 0) {
    const double tied =
        cut.key == 0 ? 0.0
                     : fmin(all_ties, static_cast<double>(cut.ties)) * __uint_as_float(cut.key - 1);
    const int64_t place = int64_t{row} * args.num_queries + args.first_query + query;
    args.dropped[place * kNumPeriods + j] = 1.0 - total - tied;
  }
}

// After the last pass; one thread a row.
__global__ void choose_period(const __grid_constant__ ReplayArgs args, double tolerance) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  const sikv_cache_view& view = args.view;
  if (row >= view.num_sequences * view.num_kv_heads) return;
  if (args.keys.count[row / view.num_kv_heads] == 0) return;
  double dropped[kNumPeriods] = {};
  for (int i = 0; i < args.num_queries; ++i) {
    for (int j = 0; j < kNumPeriods; ++j) {
      dropped[j] += args.dropped[(int64_t{row} * args.num_queries + i) * kNumPeriods + j];
    }
  }
  const double n = max(args.num_queries, 1);
  int best = 0;
  for (int j = 1; j < kNumPeriods; ++j) {
    if (dropped[j] / n <= dropped[0] / n + tolerance) best = j;
  }
  args.step.pool.state[row].period = 1 << best;
}

// prompt_mean of a row = mean of its last `num_queries` queries over positions and heads. grid
// (rows), D threads. Queries of a sequence are `positions` rows of Hq * D elements, of which the
// last ones count.
__global__ void learn_mean(const __grid_constant__ sikv_cache_view view, const void* queries,
                           int positions, int num_queries, int group, const int32_t* prompt_count,
                           float* prompt_mean) {
  const int row = blockIdx.x, head_dim = view.head_dim, d = threadIdx.x;
  const int sequence = row / view.num_kv_heads, head = row % view.num_kv_heads;
  if (prompt_count[sequence] == 0) return;
  const int64_t stride = int64_t{view.num_kv_heads} * group * head_dim;
  const int64_t first = (int64_t{sequence + 1} * positions - num_queries) * stride +
                        int64_t{head} * group * head_dim + d;
  double sum = 0.0;
  for (int i = 0; i < num_queries; ++i) {
    for (int g = 0; g < group; ++g) {
      sum += load_element(queries, view.dtype, first + i * stride + int64_t{g} * head_dim);
    }
  }
  const double n = static_cast<double>(max(num_queries, 1)) * group;
  prompt_mean[int64_t{row} * head_dim + d] = static_cast<float>(sum / n);
}

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_REPLAY_CUH_
