#include <algorithm>

#include "kernels/common/cuda_launch.h"
#include "selectors/self_index/self_index_cuda.h"
#include "selectors/self_index/self_index_rerank.cuh"

namespace sikv::self_index {
namespace {

// Logits and keys of a block's candidates, besides 18 KB of static shared memory: two blocks share
// a multiprocessor.
constexpr int64_t kCandidateBytes = 64 << 10;

template <typename Body>
void with_kernel(RerankKeys keys, Body&& body) {
  switch (keys) {
    case RerankKeys::kLevels3:
      return body(rerank_select<RerankKeys::kLevels3>);
    case RerankKeys::kSignMinMax2:
      return body(rerank_select<RerankKeys::kSignMinMax2>);
    default:
      return body(rerank_select<RerankKeys::kUnits>);
  }
}

RerankKeys reading_of(const cuda::RowStore& keys) {
  if (!cuda::tile_reads(keys)) return RerankKeys::kUnits;
  return keys.kind == cuda::RowKind::kSignLevels ? RerankKeys::kLevels3 : RerankKeys::kSignMinMax2;
}

}  // namespace

Reranker::Reranker(const sikv_device& device, const sikv_shape& shape, int64_t most_candidates)
    : group_(shape.num_query_heads / shape.num_kv_heads),
      head_dim_(shape.head_dim),
      most_(most_candidates) {
  shared_candidates_ =
      static_cast<int>(kCandidateBytes / ((padded_heads(group_) + 1) * 4) / kCompactTokens) *
      kCompactTokens;
  const auto bytes =
      static_cast<int>(rerank_shared_bytes(group_, head_dim_, shared_candidates_));
  resident_ = 2 * device.multiprocessors;
  for (RerankKeys keys :
       {RerankKeys::kUnits, RerankKeys::kLevels3, RerankKeys::kSignMinMax2}) {
    with_kernel(keys, [&](auto kernel) {
      cuda::check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "self_index: asking for shared memory");
      int per_sm = 0;
      cuda::check(
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kRerankThreads, bytes),
          "self_index: asking for the occupancy");
      resident_ = std::min(resident_, std::max(per_sm, 1) * device.multiprocessors);
    });
  }
}

int Reranker::team(int rows) const {
  return std::clamp(resident_ / std::max(rows, 1), 1, kMaxRerankTeam);
}

int64_t Reranker::logits(int rows) const {
  if (share_of(most_, team(rows)) <= shared_candidates_) return 0;
  return rows * most_ * padded_heads(group_);
}

int64_t Reranker::keys(int rows) const {
  const int64_t share = share_of(most_, team(rows));
  return share <= shared_candidates_ ? 0 : rows * share * team(rows);
}

void Reranker::run(RerankArgs args, cudaStream_t stream) const {
  const int rows = args.view.num_sequences * args.view.num_kv_heads;
  args.most = most_;
  args.shared_candidates = shared_candidates_;
  const dim3 grid(static_cast<unsigned>(team(rows)), static_cast<unsigned>(rows));
  const int64_t share = std::min<int64_t>(share_of(most_, team(rows)), shared_candidates_);
  const auto bytes = static_cast<size_t>(rerank_shared_bytes(group_, head_dim_, share));
  with_kernel(reading_of(args.keys), [&](auto kernel) {
    kernel<<<grid, kRerankThreads, bytes, stream>>>(args);
  });
  cuda::check_launch("self_index rerank_select", grid, kRerankThreads, stream);
}

}  // namespace sikv::self_index
