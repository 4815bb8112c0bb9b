// What the launches of each phase take, and how they are sized.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_ARGS_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_ARGS_CUH_

#include "kernels/common/warp_rows.cuh"
#include "selectors/self_index/self_index_step.cuh"
#include "selectors/self_index/self_index_team.cuh"

namespace sikv::self_index {

// ---- scan ---------------------------------------------------------------------------------------

struct ScanArgs {
  sikv_cache_view view;
  Step step;
  cuda::Plane index, weights;  // weights: SCALE, with norm_weighting
  const float* codebook;       // [rows, D/4, 16, 4]
  int chunk;                   // tokens of a block, a multiple of 256; with a pool at most
  int most_blocks;             // of a row: those that the GPU holds at a time
  int few_tokens;              // half of the blocks do where that leaves no more to each
  int32_t* slots;              // [rows, capacity] what is found, without a pool
  int64_t capacity;
  int32_t* found;  // [rows]
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
  int due_weight;   // what a due row costs, where one that is not costs 1
  int keep_tokens;  // keys that fit into a block's shared memory
};

// In fours, as a lane of rerank_keep reads them.
__host__ __device__ constexpr int padded_heads(int group) { return (group + 3) / 4 * 4; }

// ---- replay of a prompt -------------------------------------------------------------------------

inline constexpr int kNumPeriods = 4;  // 1, 2, 4, 8
inline constexpr int kReplayThreads = 256;
inline constexpr int kReplayTokens = 2048;  // of a block, for the exact logits

struct ReplayArgs {
  sikv_cache_view view;
  Step step;  // q: the replayed query, prompt_len set
  sikv_rows keys;
  int query, num_queries;  // number of the query, of how many
  int most_tokens;         // of a prompt
  float* logits;           // [rows, most_tokens, G], times log2(e)
  float2* sums;            // [rows, blocks, G]
  float* probability;      // [rows, most_tokens]
  int64_t capacity;
  int32_t* candidates[kNumPeriods];  // [rows, capacity], of the last scan of each period
  int32_t* found[kNumPeriods];       // [rows]
  double* dropped;                   // [rows, kNumPeriods], summed over the queries
};

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_ARGS_CUH_
