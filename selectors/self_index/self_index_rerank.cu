#include <algorithm>

#include "kernels/common/cuda_launch.h"
#include "selectors/self_index/self_index_cuda.h"
#include "selectors/self_index/self_index_rerank.cuh"

namespace sikv::self_index {
namespace {

template <typename Body>
void with_kernel(const cuda::RowStore& keys, Body&& body) {
  if (!cuda::tile_reads(keys)) return body(rerank_score<RerankKeys::kUnits>);
  if (keys.line > 0) return body(rerank_score<RerankKeys::kLineLevels3>);
  if (keys.kind == cuda::RowKind::kSignLevels) return body(rerank_score<RerankKeys::kLevels3>);
  body(rerank_score<RerankKeys::kSignMinMax2>);
}

}  // namespace

// A launch that may begin before the one before it is over, where the GPU can do that.
void Reranker::launch(const char* name, void (*kernel)(RerankArgs), dim3 grid, int threads,
                      size_t bytes, cudaStream_t stream, const RerankArgs& args) const {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps_ ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args);
  cuda::check_launch(name, grid, config.blockDim, stream);
}

Reranker::Reranker(const sikv_device& device, int64_t most_candidates)
    : score_slots_(kScoreBlocks * device.multiprocessors),
      overlaps_(device.compute_capability >= 90),
      most_(most_candidates) {
  // Blocks of rerank_keep wait for those of their row: the GPU must hold them all.
  keep_blocks_ = static_cast<int>((most_ + kKeepTokens - 1) / kKeepTokens);
  if (keep_blocks_ > device.multiprocessors) {
    throw Refused("self_index ranks up to " +
                  std::to_string(int64_t{device.multiprocessors} * kKeepTokens) +
                  " candidates of a row on this GPU, not " + std::to_string(most_) +
                  ": lower budget or rerank");
  }
  cuda::check(cudaFuncSetAttribute(rerank_keep, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kKeepTokens * static_cast<int>(sizeof(uint32_t))),
              "self_index: asking for shared memory");
}

int Reranker::score_blocks(int rows) const {
  return std::clamp(score_slots_ / std::max(rows, 1), 1, 32);
}

void Reranker::run(RerankArgs args, cudaStream_t stream) const {
  const auto rows = static_cast<unsigned>(args.view.num_sequences * args.view.num_kv_heads);
  args.most = most_;
  args.score_blocks = score_blocks(static_cast<int>(rows));
  const dim3 scores(static_cast<unsigned>(args.score_blocks), rows);
  const auto query_bytes = 2 * sizeof(float) * static_cast<size_t>(args.step.group) *
                           static_cast<size_t>(args.view.head_dim);
  with_kernel(args.keys,
              [&](auto kernel) { kernel<<<scores, kRerankThreads, query_bytes, stream>>>(args); });
  cuda::check_launch("self_index rerank_score", scores, kRerankThreads, stream);

  const dim3 keep(static_cast<unsigned>(keep_blocks_), rows);
  const int64_t most = (most_ + kCompactTokens - 1) / kCompactTokens * kCompactTokens;
  const auto key_bytes =
      sizeof(uint32_t) * static_cast<size_t>(std::min<int64_t>(most, kKeepTokens));
  launch("self_index rerank_keep", rerank_keep, keep, kKeepThreads, key_bytes, stream, args);
}

}  // namespace sikv::self_index
