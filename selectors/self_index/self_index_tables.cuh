// The lookup tables of one row in shared memory, by the steps of self_index_tables.cc: equal
// tables, hence equal scores.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_TABLES_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_TABLES_CUH_

#include <cfloat>

#include "selectors/self_index/self_index_step.cuh"
#include "selectors/self_index/self_index_tables.h"

namespace sikv::self_index {

template <int D>
struct TableScratch {
  float lowest[D / 4], width[D / 4];
  TableScale scale;
};

// One table entry: query . centre.
__device__ inline float table_entry(const float* query, float4 centre) {
  float sum = mul_rn(query[0], centre.x);
  sum = add_rn(sum, mul_rn(query[1], centre.y));
  sum = add_rn(sum, mul_rn(query[2], centre.z));
  return add_rn(sum, mul_rn(query[3], centre.w));
}

// Calls store(entry, level) for all entries of the 6-bit tables of exact(entry), [D/4, 16], and
// returns their scale, whose offset is only filled if `with_offset`. All threads; a barrier before
// the end, none after.
template <int D, int kThreads, typename Exact, typename Store>
__device__ TableScale quantise(Exact&& exact, Store&& store, bool with_offset,
                               TableScratch<D>& scratch) {
  constexpr int kEntries = 4 * D, kPer = (kEntries + kThreads - 1) / kThreads;
  float value[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int entry = i * kThreads + threadIdx.x;
    if (entry >= kEntries) break;  // whole warps
    value[i] = exact(entry);
    float low = value[i], high = value[i];
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      low = fminf(low, __shfl_xor_sync(~0u, low, distance));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, distance));
    }
    if (entry % 16 == 0) {
      scratch.lowest[entry / 16] = low;
      scratch.width[entry / 16] = add_rn(high, -low);
    }
  }
  __syncthreads();
  // Widths are not negative, so their bits compare as they do.
  uint32_t widest_bits = 0;
  for (int g = threadIdx.x % 32; g < D / 4; g += 32) {
    widest_bits = max(widest_bits, __float_as_uint(scratch.width[g]));
  }
  const float widest = __uint_as_float(__reduce_max_sync(~0u, widest_bits));
  const float inverse = div_rn(static_cast<float>(kTableMax), widest);
  const bool flat = !(inverse <= FLT_MAX);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int entry = i * kThreads + threadIdx.x;
    if (entry >= kEntries) break;
    const float level = rintf(mul_rn(add_rn(value[i], -scratch.lowest[entry / 16]), inverse));
    store(entry, flat ? 0.0f : fminf(level, static_cast<float>(kTableMax)));
  }
  float offset = 0.0f;
  if (with_offset) {
    if (threadIdx.x == 0) {
      for (int g = 0; g < D / 4; ++g) offset = add_rn(offset, scratch.lowest[g]);
      scratch.scale.offset = offset;
    }
    __syncthreads();
    offset = scratch.scale.offset;
  }
  return {flat ? 0.0f : div_rn(widest, static_cast<float>(kTableMax)), offset};
}

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_TABLES_CUH_
