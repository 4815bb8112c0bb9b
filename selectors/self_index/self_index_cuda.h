// Launchers of the cuda variant's kernels, one source file per phase.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_CUDA_H_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_CUDA_H_

#include <cuda_runtime.h>

#include <algorithm>

#include "plugins/abi/sikv_selector.h"
#include "selectors/self_index/self_index_args.cuh"

namespace sikv::self_index {

class Scanner {
 public:
  // Throws Refused if a row of `max_tokens` needs more blocks than the GPU holds.
  Scanner(const sikv_device& device, int head_dim, bool integer, int sets, int max_tokens);
  // Fills args.chunk and .most_blocks and launches.
  void run(ScanArgs args, cudaStream_t stream) const;

 private:
  int head_dim_, sets_, largest_chunk_, resident_;
  bool integer_;
};

class Reranker {
 public:
  Reranker(const sikv_device& device, int64_t most_candidates);
  int64_t most() const { return most_; }
  // Blocks that score `rows` rows, at most.
  int64_t num_sums(int rows) const { return std::max(score_slots_, rows); }
  // Fills args.most, .score_blocks, .due_weight and .keep_tokens and launches.
  void run(RerankArgs args, cudaStream_t stream) const;

 private:
  int multiprocessors_;
  int score_slots_;  // blocks of rerank_score that run at a time
  bool clusters_;
  int most_keep_tokens_;  // of a block, as shared memory allows
  int64_t most_;
};

// Launches of one pass, after its scan into args.candidates.
void run_replay(const ReplayArgs& args, cudaStream_t stream);
void run_choose_period(const ReplayArgs& args, double tolerance, cudaStream_t stream);
void run_learn_mean(const sikv_observe_args& args, int num_queries, int group, float* prompt_mean,
                    cudaStream_t stream);

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_CUDA_H_
