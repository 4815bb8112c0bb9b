// What a selector learns from the last queries of a prompt: the mean that refresh_cosine measures
// turns from, and for schedule: auto the longest period whose replay drops little (the definition
// is self_index_schedule.cc). One query of all rows at a time:
//
//   exact logits of the prompt -> probabilities; scan -> candidates; mass kept at every period
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_REPLAY_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_REPLAY_CUH_

#include <cub/block/block_reduce.cuh>

#include "selectors/self_index/self_index_args.cuh"
#include "selectors/self_index/self_index_softmax.cuh"
#include "selectors/self_index/self_index_team.cuh"

namespace sikv::self_index {

__device__ inline int replay_position(const ReplayArgs& args, int sequence) {
  return args.step.prompt_len[sequence] - args.num_queries + args.query;
}

// grid (most_tokens / kReplayTokens, rows)
__global__ void __launch_bounds__(kReplayThreads)
    replay_logits(const __grid_constant__ ReplayArgs args) {
  const sikv_cache_view& view = args.view;
  const int row = blockIdx.y, sequence = row / view.num_kv_heads, group = args.step.group;
  const int head_dim = view.head_dim, warp = threadIdx.x / 32;
  const int first = blockIdx.x * kReplayTokens;
  const int last = min(first + kReplayTokens, replay_position(args, sequence) + 1);
  extern __shared__ uint4 dynamic[];
  __shared__ float2 warp_sums[kReplayThreads / 32][kMaxGroup];
  float* q = reinterpret_cast<float*>(dynamic);
  const float scale = args.step.scale * 1.4426950408889634f;
  const int64_t query = first_query(args.step, view, row);
  for (int i = threadIdx.x; i < group * head_dim; i += kReplayThreads) {
    q[i] = scale * load_element(args.step.q, view.dtype, query + i);
  }
  __syncthreads();
  const UnitReader reader(head_dim);
  SoftmaxSum sums[2];
  for (int base = first + warp * reader.tokens(); base < last;
       base += kReplayThreads / 32 * reader.tokens()) {
    const int token = base + reader.token;
    float x[cuda::kUnit] = {}, found[2];
    if (token < last && reader.unit >= 0) {
      const int64_t offset = (int64_t{args.keys.first[sequence]} + token) * args.keys.token_stride +
                             row % view.num_kv_heads * args.keys.head_stride;
      const auto* data = static_cast<const uint8_t*>(args.keys.data);
      cuda::load_raw_unit(data + offset * sikv_dtype_bytes(args.keys.dtype), args.keys.dtype,
                          reader.unit, x);
    }
    reader.dot(x, q, group, head_dim, found);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = reader.sub + i * reader.lanes;
      if (head >= group || token >= last) continue;
      args.logits[(int64_t{row} * args.most_tokens + token) * group + head] = found[i];
      sums[i].add(found[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int distance = reader.lanes; distance < 32; distance *= 2) sums[i].merge_lanes(distance);
    const int head = reader.sub + i * reader.lanes;
    if (reader.token == 0 && head < kMaxGroup) warp_sums[warp][head] = sums[i].pair();
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < group) {
    SoftmaxSum sum;
    for (int w = 0; w < kReplayThreads / 32; ++w) sum.merge(warp_sums[w][threadIdx.x]);
    args.sums[(int64_t{row} * gridDim.x + blockIdx.x) * group + threadIdx.x] = sum.pair();
  }
}

// The same grid.
__global__ void __launch_bounds__(kReplayThreads)
    replay_probability(const __grid_constant__ ReplayArgs args) {
  const int row = blockIdx.y, group = args.step.group;
  const int first = blockIdx.x * kReplayTokens;
  const int last =
      min(first + kReplayTokens, replay_position(args, row / args.view.num_kv_heads) + 1);
  if (first >= last) return;
  __shared__ float highest[kMaxGroup], weight[kMaxGroup];
  const int lane = threadIdx.x % 32;
  for (int g = threadIdx.x / 32; g < group; g += kReplayThreads / 32) {
    SoftmaxSum sum;
    for (int block = lane; block < static_cast<int>(gridDim.x); block += 32) {
      sum.merge(args.sums[(int64_t{row} * gridDim.x + block) * group + g]);
    }
    for (int distance = 16; distance > 0; distance /= 2) sum.merge_lanes(distance);
    if (lane == 0) {
      highest[g] = sum.highest;
      weight[g] = 1.0f / (static_cast<float>(group) * sum.sum);
    }
  }
  __syncthreads();
  for (int token = first + threadIdx.x; token < last; token += kReplayThreads) {
    const int64_t place = int64_t{row} * args.most_tokens + token;
    float probability = 0.0f;
    for (int g = 0; g < group; ++g) {
      probability += exp2f(args.logits[place * group + g] - highest[g]) * weight[g];
    }
    args.probability[place] = probability;
  }
}

// grid (periods, rows)
__global__ void __launch_bounds__(kReplayThreads)
    replay_kept(const __grid_constant__ ReplayArgs args) {
  const sikv_cache_view& view = args.view;
  const int j = blockIdx.x, row = blockIdx.y, sequence = row / view.num_kv_heads;
  if (args.keys.count[sequence] == 0) return;
  const int position = replay_position(args, sequence);
  __shared__ uint32_t histogram[kRadixBins];
  __shared__ SelectScratch<kReplayThreads> select;
  __shared__ typename cub::BlockReduce<double, kReplayThreads>::TempStorage reduce;

  int32_t* list = args.candidates[j] + int64_t{row} * args.capacity;
  if (j > 0 && args.query % (1 << j) == 0) {
    const int32_t* fresh = args.candidates[0] + int64_t{row} * args.capacity;
    for (int i = threadIdx.x; i < args.found[0][row]; i += kReplayThreads) list[i] = fresh[i];
    if (threadIdx.x == 0) args.found[j][row] = args.found[0][row];
    __syncthreads();
  }
  // Tokens not yet seen are dropped; the list ascends.
  int seen = 0, end = args.found[j][row];
  while (seen < end) {
    const int middle = (seen + end) / 2;
    if (list[middle] <= position) {
      seen = middle + 1;
    } else {
      end = middle;
    }
  }
  const float* probability = args.probability + int64_t{row} * args.most_tokens;
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
    args.dropped[row * kNumPeriods + j] += 1.0 - total - tied;
  }
}

// After the last query; one thread a row.
__global__ void choose_period(const __grid_constant__ ReplayArgs args, double tolerance) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  const sikv_cache_view& view = args.view;
  if (row >= view.num_sequences * view.num_kv_heads) return;
  if (args.keys.count[row / view.num_kv_heads] == 0) return;
  const double* dropped = args.dropped + row * kNumPeriods;
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
