#include "kernels/common/cuda_launch.h"
#include "selectors/self_index/self_index_cuda.h"
#include "selectors/self_index/self_index_replay.cuh"

namespace sikv::self_index {

void run_replay(const ReplayArgs& args, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(args.view.num_sequences * args.view.num_kv_heads);
  const dim3 grid(static_cast<unsigned>((args.most_tokens + kReplayTokens - 1) / kReplayTokens),
                  rows);
  const auto query_bytes = sizeof(float) * static_cast<size_t>(args.step.group) *
                           static_cast<size_t>(args.view.head_dim);
  replay_logits<<<grid, kReplayThreads, query_bytes, stream>>>(args);
  cuda::check_launch("self_index replay_logits", grid, kReplayThreads, stream);
  replay_probability<<<grid, kReplayThreads, 0, stream>>>(args);
  cuda::check_launch("self_index replay_probability", grid, kReplayThreads, stream);
  replay_kept<<<dim3(kNumPeriods, rows), kReplayThreads, 0, stream>>>(args);
  cuda::check_launch("self_index replay_kept", dim3(kNumPeriods, rows), kReplayThreads, stream);
}

void run_choose_period(const ReplayArgs& args, double tolerance, cudaStream_t stream) {
  const int rows = args.view.num_sequences * args.view.num_kv_heads;
  const dim3 grid(static_cast<unsigned>((rows + 127) / 128));
  choose_period<<<grid, 128, 0, stream>>>(args, tolerance);
  cuda::check_launch("self_index choose_period", grid, 128, stream);
}

void run_learn_mean(const sikv_observe_args& args, int num_queries, int group, float* prompt_mean,
                    cudaStream_t stream) {
  const sikv_cache_view& view = *args.view;
  const dim3 grid(static_cast<unsigned>(view.num_sequences * view.num_kv_heads));
  const dim3 block(static_cast<unsigned>(view.head_dim));
  learn_mean<<<grid, block, 0, stream>>>(view, args.queries, args.num_queries, num_queries, group,
                                         args.keys.count, prompt_mean);
  cuda::check_launch("self_index learn_mean", grid, block, stream);
}

}  // namespace sikv::self_index
