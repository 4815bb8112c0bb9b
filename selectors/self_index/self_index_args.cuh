// What the launches of each phase take, and how they are sized.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_ARGS_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_ARGS_CUH_

#include "kernels/common/warp_rows.cuh"
#include "selectors/self_index/self_index_step.cuh"
#include "selectors/self_index/self_index_team.cuh"

namespace sikv::self_index {

// ---- scan ---------------------------------------------------------------------------------------

// Rows of a launch, and in a replay how many queries each of them is scanned for. What a row is
// found for a query is list query * num_rows + row - first_row. In a grid rows are y, queries z.
struct Pass {
  int first_row, num_rows, num_queries;

  __host__ __device__ int lists() const { return num_rows * num_queries; }
  __device__ int row() const { return first_row + static_cast<int>(blockIdx.y); }
  __device__ int query() const { return static_cast<int>(blockIdx.z); }
  __device__ int list(int query) const { return query * num_rows + static_cast<int>(blockIdx.y); }
};

struct ScanArgs {
  sikv_cache_view view;
  Step step;
  cuda::Plane index, weights;  // weights: SCALE, with norm_weighting
  const float* codebook;       // [rows, D/4, 16, 4]
  int chunk;                   // tokens of a block, a multiple of 256; with a pool at most
  int most_blocks;             // of a row: those that the GPU holds at a time
  int few_tokens;              // half of the blocks do where that leaves no more to each
  Pass pass;                   // outside a replay all rows, with one query
  int32_t* slots;              // [lists, capacity] what is found, without a pool
  int64_t capacity;
  int32_t* found;  // [lists]
};

// ---- rerank -------------------------------------------------------------------------------------

// Slots encoded since a row's last scan that its pool can take up: periods are at most 64 steps, in
// which a sequence fills one page.
inline constexpr int kNewSlots = 4 * SIKV_PAGE_TOKENS;

// How the encoded keys are read: any layout, or as tiles of 16 tokens (warp_rows.cuh).
enum class RerankKeys { kUnits, kLevels3, kLineLevels3, kSignMinMax2 };

struct RerankArgs {
  sikv_cache_view view;
  Step step;
  cuda::RowStore keys;
  const int32_t* candidates;  // [rows, capacity] without a pool
  int64_t capacity;
  const int32_t* found;  // [rows]
  sikv_selection selection;
  int64_t most;   // candidates of a row
  float* logits;  // [rows, most, padded_heads(G)], times log2(e)
  float2* sums;   // [score_blocks, G] highest logit and sum of each block
  int score_blocks;
  int due_weight, other_weight;  // what a row costs that is due, and one that is not
  int keep_tokens;               // keys that fit into a block's shared memory
};

// In fours, as a lane of rerank_keep reads them.
__host__ __device__ constexpr int padded_heads(int group) { return (group + 3) / 4 * 4; }

// ---- replay of a prompt -------------------------------------------------------------------------

inline constexpr int kNumPeriods = 4;  // 1, 2, 4, 8
// A pass begins with a multiple of the longest period: all scans that it needs are its own.
inline constexpr int kQueryTile = 16;                // of a warp
inline constexpr int kPassQueries = 3 * kQueryTile;  // at most
inline constexpr int kReplayThreads = 256;

// Tokens of a block that attends; its keys and a head's queries are in shared memory as fp32.
__host__ __device__ constexpr int attend_tokens(int head_dim) { return head_dim > 128 ? 32 : 128; }

// One pass over some queries of some rows; list as in Pass.
struct ReplayArgs {
  sikv_cache_view view;
  Step step;  // q: the first query of the pass; prompt_len set
  sikv_rows keys;
  Pass pass;
  int first_query, num_queries;  // number of the pass's first query, and how many there are in all
  int most_tokens;               // of a prompt
  int blocks;                    // of a row that attend
  float2* sums;                  // [pass.num_rows, G, blocks, kPassQueries]
  float2* weights;               // [pass.num_rows, G, kPassQueries] highest logit and 1 / (G * sum)
  float* probability;            // [lists, most_tokens]
  const int32_t* candidates;     // [lists, capacity]
  int64_t capacity;
  const int32_t* found;  // [lists]
  double* dropped;       // [rows, num_queries, kNumPeriods]
};

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_ARGS_CUH_
