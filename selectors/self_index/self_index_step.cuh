// What all kernels of a step know: the run's parameters, a row's budget, its queries, its state
// between steps.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_STEP_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_STEP_CUH_

#include <cstdint>

#include "kernels/common/thread_cache.cuh"
#include "plugins/layouts/arithmetic.h"
#include "plugins/layouts/rotation.h"
#include "selectors/self_index/self_index_team.cuh"

namespace sikv::self_index {

// Of one (layer, sequence, KV head) between steps, where candidates outlive one.
struct PoolState {
  int32_t period;  // steps, chosen by schedule auto; 0: scan_every
  int32_t scanned;
  int32_t scanned_len;  // slots there were at the last scan
  int32_t pool_count;   // candidates it found
  int64_t next_scan;    // step
  int32_t packed;       // the candidates have packed copies
  int32_t reserved;
};

// Copies of candidates' keys in the order of the pool, so that steps between scans stream what they
// would have to gather: 50 bytes a token for 192 bytes of sectors (rlm4 of 3 bits, D = 128). A lane
// of KeyTile (warp_rows.cuh) has a word of signs and two of levels, a token one scale.
struct PoolKeys {
  uint32_t* signs;   // [tokens, 4]
  uint64_t* levels;  // [tokens, 4]
  void* scales;      // [tokens] of 2 bytes (rlm4) or 16 (sign4)
};

// Device memory; all null without a pool. Of one layer:
struct Pool {
  PoolState* state;  // [rows]
  int64_t* step;     // [rows] of the next run
  int32_t* slots;    // [rows, capacity] ascending
  int64_t capacity;
  PoolKeys packed;     // [rows, capacity]; null if candidates are read where they lie
  float* scan_query;   // [rows, D] group-mean query of the last scan; null without refresh_cosine
  float* prompt_mean;  // [rows, D]
  // Of this step, of whatever layer
  int32_t* order;    // [rows] those that are due, then the others
  int32_t* num_due;  // how many
};

// `read`: bytes of index and keys, as ScanCost (plugins/sdk/scan_cost.h) counts them. Copies of
// candidates have as many as the keys they are made of.
struct RowCounts {
  unsigned long long rows, scans, read;
};

struct Step {
  // What to do
  int64_t budget_count;  // -1: budget_fraction
  double budget_fraction;
  int rerank;
  bool six_bit, norm_weighting, max_over_heads, rotated;
  int scan_every;
  bool stagger;
  double refresh_cosine;
  int64_t index_page_bytes, key_page_bytes, exact_key_bytes;  // that a scan and a rerank read
  // With what
  const void* q;              // [B, ..., Hq, D]
  int64_t q_stride;           // elements from one sequence to the next
  int64_t query_stride;       // and from one replayed query to the next
  const int32_t* prompt_len;  // [B] stands for the current length in a replay; else null
  int group;                  // G
  float scale;
  Pool pool;
  TeamState* teams;   // [rows], in a replay [lists]
  RowCounts* counts;  // [rows] or null
};

__device__ inline int row_length(const Step& step, const sikv_cache_view& view, int row) {
  const int sequence = row / view.num_kv_heads;
  if (step.prompt_len != nullptr) return step.prompt_len[sequence];
  return view.encoded_len[row] + view.tail_len[sequence];
}

__device__ inline int64_t row_budget(const Step& step, const sikv_cache_view& view, int row) {
  if (step.budget_count >= 0) return step.budget_count;
  return static_cast<int64_t>(step.budget_fraction *
                              static_cast<double>(row_length(step, view, row)));
}

__device__ inline int64_t row_candidates(const Step& step, int64_t budget) {
  return step.rerank * min(budget, int64_t{0x7fffffff});
}

__device__ inline float load_element(const void* data, int32_t dtype, int64_t i) {
  switch (dtype) {
    case SIKV_FP16:
      return __half2float(static_cast<const __half*>(data)[i]);
    case SIKV_BF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

// First element of a row's G query heads, of number `query` in a replay.
__device__ inline int64_t first_query(const Step& step, const sikv_cache_view& view, int row,
                                      int query = 0) {
  const int64_t sequence = row / view.num_kv_heads, head = row % view.num_kv_heads;
  return sequence * step.q_stride + query * step.query_stride + head * step.group * view.head_dim;
}

// Pinned slots of a row below `end`. All threads; one barrier at least.
__device__ inline int count_pinned(const sikv_cache_view& view, int row, int first, int end) {
  const int32_t* slots = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  const int n = view.pinned_len[row];
  int count = 0, i = threadIdx.x;
  do {
    count += __syncthreads_count(i < n && slots[i] >= first && slots[i] < end);
    i += blockDim.x;
  } while (i - static_cast<int>(threadIdx.x) < n);
  return count;
}

// x [D] in shared memory <- R x, in the order of plugins/layouts/rotation.h. All threads; a barrier
// before and after.
__device__ inline void rotate_shared(float* x, int head_dim) {
  const int block = rotation::block(head_dim);
  __syncthreads();
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) x[d] *= rotation::sign(d);
  for (int half = 1; half < block; half *= 2) {
    __syncthreads();
    for (int pair = threadIdx.x; pair < head_dim / 2; pair += blockDim.x) {
      const int i = pair / half * 2 * half + pair % half;
      const float lower = x[i], upper = x[i + half];
      x[i] = add_rn(lower, upper);
      x[i + half] = add_rn(lower, -upper);
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
    x[d] = mul_rn(x[d], rotation::norm(block));
  }
  __syncthreads();
}

// Channel d of the mean of the row's G query heads, in the order of group_mean
// (plugins/sdk/select.h). Reports numbers that are not storable if `check`.
__device__ inline float mean_element(const Step& step, const sikv_cache_view& view, int row, int d,
                                     bool check, int query = 0) {
  constexpr int kBatch = 4;  // heads asked for at once
  const int64_t first = first_query(step, view, row, query) + d;
  float sum = 0.0f;
  for (int g = 0; g < step.group; g += kBatch) {
    float x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int head = min(g + i, step.group - 1);
      x[i] = load_element(step.q, view.dtype, first + int64_t{head} * view.head_dim);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (g + i >= step.group) break;
      if (check && !cuda::is_storable(x[i])) {
        cuda::report_fault(view, SIKV_FAULT_Q, row / view.num_kv_heads,
                           row % view.num_kv_heads * step.group + g + i,
                           row_length(step, view, row) - 1, d, x[i]);
      }
      sum = add_rn(sum, x[i]);
    }
  }
  return div_rn(sum, static_cast<float>(step.group));
}

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_STEP_CUH_
