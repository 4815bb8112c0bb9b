// What all kernels of a step know: the run's parameters, a row's budget, its queries, its state
// between steps.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_STEP_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_STEP_CUH_

#include <cstdint>

#include "kernels/common/thread_cache.cuh"
#include "kernels/common/warp_rows.cuh"
#include "plugins/layouts/arithmetic.h"
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

// to [D] <- R from [D], in shared memory, bit for bit as plugins/layouts/rotation.h. One warp does it:
// a barrier of the block for each of its steps took 0.7 us longer. All threads; a barrier before
// and after.
template <int D>
__device__ inline void rotate_shared(const float* from, float* to) {
  const int lane = threadIdx.x % 32;
  __syncthreads();
  if (threadIdx.x < 32) {
    float x[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) x[i] = from[lane + 32 * i];
    cuda::warp_flip_signs(x);
    cuda::warp_hadamard(x, D);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) to[lane + 32 * i] = x[i];
  }
  __syncthreads();
}

// Channel d of the mean of a row's G query heads, in the order of group_mean (plugins/sdk/select.h).
class MeanChannel {
 public:
  // Asks for the first heads; waits for nothing.
  __device__ MeanChannel(const Step& step, const sikv_cache_view& view, int row, int d,
                         int query = 0)
      : step_(step), view_(view), row_(row), d_(d) {
    first_ = first_query(step, view, row, query) + d;
    load(0);
  }
  // Reports a number that is not storable if `check`.
  __device__ float get(bool check) {
    float sum = 0.0f;
    bool storable = true;
    for (int g = 0;;) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (g + i >= step_.group) break;
        const float x = element(raw_[i]);
        storable = storable && cuda::is_storable(x);
        sum = add_rn(sum, x);
      }
      if ((g += kBatch) >= step_.group) break;
      load(g);
    }
    if (check && !storable) report();
    return div_rn(sum, static_cast<float>(step_.group));
  }

 private:
  static constexpr int kBatch = 4;  // heads asked for at once

  __device__ void load(int g) {
    const auto index = [&](int i) {
      return first_ + int64_t{min(g + i, step_.group - 1)} * view_.head_dim;
    };
    if (view_.dtype == SIKV_FP32) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        raw_[i] = __ldg(static_cast<const uint32_t*>(step_.q) + index(i));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        raw_[i] = cuda::load_half(static_cast<const uint16_t*>(step_.q) + index(i));
      }
    }
  }
  __device__ void report() const {
#pragma unroll 1
    for (int g = 0; g < step_.group; ++g) {
      const float x = load_element(step_.q, view_.dtype, first_ + int64_t{g} * view_.head_dim);
      if (cuda::is_storable(x)) continue;
      cuda::report_fault(view_, SIKV_FAULT_Q, row_ / view_.num_kv_heads,
                         row_ % view_.num_kv_heads * step_.group + g,
                         row_length(step_, view_, row_) - 1, d_, x);
    }
  }
  __device__ float element(uint32_t raw) const {
    if (view_.dtype == SIKV_FP32) return __uint_as_float(raw);
    if (view_.dtype == SIKV_BF16) return __uint_as_float(raw << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
  }

  const Step& step_;
  const sikv_cache_view& view_;
  int row_, d_;
  int64_t first_;
  uint32_t raw_[kBatch];
};

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_STEP_CUH_
