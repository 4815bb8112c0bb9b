#include <algorithm>

#include "selectors/self_index/self_index_cuda.h"
#include "selectors/self_index/self_index_keep.cuh"
#include "selectors/self_index/self_index_rerank.cuh"

namespace sikv::self_index {
namespace {

// Of rerank_score, for a row. More find no window of their own.
constexpr int kMostScoreBlocks = 32;
// What it costs to gather a candidate's key from the cache and to pack it, from planes or from lines,
// and to stream its copy: 56, 31 and 13 us of loops at 64 rows of 8192 candidates.
constexpr int kPlanesWeight = 8, kLinesWeight = 5, kCopyWeight = 2;

template <typename Body>
void with_kernel(const cuda::RowStore& keys, int group, Body&& body) {
  if (!cuda::tile_reads(keys)) return body(rerank_score<RerankKeys::kUnits>);
  if (keys.kind == cuda::RowKind::kSignMinMax) return body(rerank_score<RerankKeys::kSignMinMax2>);
  const bool four = group <= 4;
  if (keys.line > 0) {
    body(four ? rerank_score<RerankKeys::kLineLevels3, true>
              : rerank_score<RerankKeys::kLineLevels3>);
  } else {
    body(four ? rerank_score<RerankKeys::kLevels3, true> : rerank_score<RerankKeys::kLevels3>);
  }
}

}  // namespace

Reranker::Reranker(const sikv_device& device, int64_t most_candidates)
    : multiprocessors_(device.multiprocessors),
      score_slots_(kScoreBlocks * device.multiprocessors),
      most_(most_candidates) {
  const cudaFuncAttributes attributes = cuda::attributes_of(rerank_keep);
  clusters_ = cuda::runs_as(rerank_keep) >= 90;
  int most_shared = 0;
  cuda::check(
      cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.ordinal),
      "self_index: asking for a block's shared memory");
  const int room = most_shared - static_cast<int>(attributes.sharedSizeBytes);
  most_keep_tokens_ = std::min(kKeepTokens, room / static_cast<int>(sizeof(uint32_t)));
  cuda::check(cudaFuncSetAttribute(rerank_keep, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most_keep_tokens_ * static_cast<int>(sizeof(uint32_t))),
              "self_index: asking for shared memory");
}

void Reranker::run(RerankArgs args, cudaStream_t stream) const {
  const int rows = args.view.num_sequences * args.view.num_kv_heads;
  args.most = most_;
  args.score_blocks = std::max(std::min(score_slots_, kMostScoreBlocks * rows), rows);
  // A row whose windows all have blocks of their own gains nothing by more.
  const bool few = int64_t{args.score_blocks} * kWindow >= args.capacity * rows;
  const bool weighs = args.step.pool.packed.signs != nullptr && !few;
  args.other_weight = kCopyWeight;
  args.due_weight = !weighs ? kCopyWeight : args.keys.line > 0 ? kLinesWeight : kPlanesWeight;
  const dim3 scores(static_cast<unsigned>(args.score_blocks));
  const auto query_bytes = 2 * sizeof(float) * static_cast<size_t>(args.step.group) *
                           static_cast<size_t>(args.view.head_dim);
  with_kernel(args.keys, args.step.group, [&](auto kernel) {
    cuda::launch_overlapped("self_index rerank_score", kernel, scores, kRerankThreads, query_bytes,
                            stream, args);
  });

  // Clusters while every thread has a candidate and none waits for room: pairs have room for two
  // blocks a multiprocessor, clusters of 4 not always (64 rows: 20 us for 15).
  const auto fits = [&](unsigned blocks) {
    const int room = (blocks > 2 ? 1 : 2) * multiprocessors_;
    return static_cast<int>(blocks) * rows <= room && int64_t{blocks} * kKeepThreads <= most_;
  };
  unsigned cluster = clusters_ ? kMaxKeepBlocks : 1;
  while (cluster > 1 && !fits(cluster)) cluster /= 2;
  const int64_t tokens =
      int64_t{keep_share(static_cast<int>(most_), static_cast<int>(cluster))} * kKeepWarps;
  args.keep_tokens = tokens <= most_keep_tokens_ ? static_cast<int>(tokens) : 0;
  cuda::launch_overlapped("self_index rerank_keep", rerank_keep,
                          dim3(cluster, static_cast<unsigned>(rows)), kKeepThreads,
                          sizeof(uint32_t) * static_cast<size_t>(args.keep_tokens), stream, args,
                          cluster);
}

}  // namespace sikv::self_index
