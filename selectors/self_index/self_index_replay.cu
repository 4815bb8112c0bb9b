#include "kernels/common/cuda_launch.h"
#include "selectors/self_index/self_index_cuda.h"
#include "selectors/self_index/self_index_replay.cuh"

namespace sikv::self_index {

namespace {

template <int D, bool kSplit, bool kSums>
void attend(const ReplayArgs& args, cudaStream_t stream) {
  const int tiles = (args.pass.num_queries + kQueryTile - 1) / kQueryTile;
  const dim3 grid(static_cast<unsigned>(args.blocks), static_cast<unsigned>(args.pass.num_rows));
  const dim3 block(static_cast<unsigned>(attend_tokens(D) / kWarpTokens * 32 * tiles));
  const auto kernel = replay_attend<D, kSplit, kSums>;
  constexpr int kMostBytes = attend_shared_bytes<D>(kPassQueries / kQueryTile);
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes),
              "self_index: asking for shared memory");
  kernel<<<grid, block, static_cast<size_t>(attend_shared_bytes<D>(tiles)), stream>>>(args);
  cuda::check_launch("self_index replay_attend", grid, block, stream);
}

template <int D, bool kSplit>
void find_probabilities(const ReplayArgs& args, cudaStream_t stream) {
  attend<D, kSplit, true>(args, stream);
  const dim3 grid(static_cast<unsigned>(args.step.group),
                  static_cast<unsigned>(args.pass.num_rows));
  const dim3 block(kPassQueries, kSumSlices);
  replay_weights<attend_tokens(D)><<<grid, block, 0, stream>>>(args);
  cuda::check_launch("self_index replay_weights", grid, block, stream);
  attend<D, kSplit, false>(args, stream);
}

}  // namespace

void run_replay(const ReplayArgs& args, cudaStream_t stream) {
  cuda::with_head_dim(args.view.head_dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    if (args.keys.dtype == SIKV_FP32 || args.view.dtype == SIKV_FP32) {
      find_probabilities<kDim, true>(args, stream);
    } else {
      find_probabilities<kDim, false>(args, stream);
    }
  });
  const dim3 grid(kNumPeriods, static_cast<unsigned>(args.pass.num_rows),
                  static_cast<unsigned>(args.pass.num_queries));
  replay_kept<<<grid, kReplayThreads, 0, stream>>>(args);
  cuda::check_launch("self_index replay_kept", grid, kReplayThreads, stream);
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
