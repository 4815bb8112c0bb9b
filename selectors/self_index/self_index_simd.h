// SIMD kernels of the cpu engine, on plain pointers. One row at a time; nothing is allocated.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SIMD_H_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SIMD_H_

#include <cstddef>
#include <cstdint>

#include "kernels/common/simd_logits.h"
#include "selectors/self_index/self_index_tables.h"

namespace sikv::self_index {

// Whether this machine has the vectors that the kernels below are written for.
bool simd_runs();

// ---- scan ---------------------------------------------------------------------------------------

// One plane of a row: its page i begins at base + page_table[i] * page_stride.
struct PlanePages {
  const uint8_t* base = nullptr;
  int64_t page_stride = 0;  // bytes
};

struct ScanRequest {
  const IndexTables& tables;
  int head_dim;
  int64_t tokens;
  const int32_t* page_table;
  PlanePages index;
  PlanePages weights;       // fp16, one per token; base null: unweighted
  const int32_t* excluded;  // [num_excluded] ascending, within [0, tokens)
  int64_t num_excluded;
  int64_t count;
  bool integer_scores;  // select by the sums of one set of 6-bit tables as they are
};

// Engine::scan. `scratch` is 64-byte aligned, of simd_scan_bytes for these tokens and count or
// more.
int64_t simd_scan(const ScanRequest& request, void* scratch, int32_t* slots);
size_t simd_scan_bytes(int64_t tokens, int64_t count);

// ---- logits -------------------------------------------------------------------------------------

void simd_logits(const LogitRequest& request, LogitScratch& scratch, float* logits, int64_t stride);

// ---- softmax and selection ----------------------------------------------------------------------

// MeanSoftmax of simd_softmax.h and LogitsOf of simd_logits.h.
void simd_mean_softmax(float* logits, int64_t stride, int group, int64_t n, float* probability);

// Indices of the `budget` < n highest of scores [n], ascending, ties to the lower.
void simd_select(const float* scores, int64_t n, int64_t budget, void* scratch, int32_t* indices);
size_t simd_select_bytes(int64_t budget);

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SIMD_H_
