#include <algorithm>
#include <string>

#include "selectors/self_index/self_index_cuda.h"
#include "selectors/self_index/self_index_scan.cuh"

namespace sikv::self_index {
namespace {

constexpr int kThreads = 512;

// The scores of a block's tokens fill 64 KB at most, so that two blocks share a multiprocessor.
constexpr int kLargestChunk = 32768;

// body(kernel, shared memory of a chunk in bytes)
template <typename Body>
void with_kernel(int head_dim, bool integer, int sets, int chunk, Body&& body) {
  cuda::with_head_dim(head_dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    const auto bytes = static_cast<size_t>(scan_shared_bytes<kDim>(integer, sets, chunk));
    if (integer) {
      body(scan_select<kDim, kThreads, true>, bytes);
    } else {
      body(scan_select<kDim, kThreads, false>, bytes);
    }
  });
}

}  // namespace

Scanner::Scanner(const sikv_device& device, int head_dim, bool integer, int sets, int max_tokens)
    : head_dim_(head_dim),
      sets_(sets),
      largest_chunk_(integer ? kLargestChunk : kLargestChunk / 2),
      integer_(integer) {
  with_kernel(head_dim, integer, sets, largest_chunk_, [&](auto kernel, size_t bytes) {
    cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(bytes)),
                "self_index: asking for shared memory");
    int per_sm = 0;
    cuda::check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, bytes),
                "self_index: asking for the occupancy");
    resident_ = std::min(std::max(per_sm, 1) * device.multiprocessors, kMaxTeam);
  });
  const int64_t most = int64_t{largest_chunk_} * resident_;
  if (max_tokens > most) {
    throw Refused("self_index scans sequences of up to " + std::to_string(most) +
                  " tokens on this GPU, not " + std::to_string(max_tokens) + ": lower the context");
  }
}

void Scanner::run(ScanArgs args, cudaStream_t stream) const {
  const int lists = args.pass.lists();
  const int64_t tokens = std::max(args.view.max_encoded_len, 1);
  // All tokens in one wave of blocks, where their scores fit. With a pool that is the most a block
  // gets: when fewer rows are due, each has more blocks.
  const bool pooled = args.step.pool.state != nullptr;
  // Half of the blocks where that leaves few tokens to each: fewer merge and wait for each other, and
  // beside them the next launch's blocks find room to begin (8 rows of 32K 24.3 us a step for 25.2,
  // with rerank 8 rows of 128K 43.4 for 43.9). With a pool fewer: 64 rows of 32K with a quarter due
  // would take 75.3 for 73.0.
  args.few_tokens = pooled ? 2048 : 8192;
  const bool few = !pooled && tokens * lists <= int64_t{args.few_tokens} * (resident_ / 2);
  const int blocks = std::clamp((few ? resident_ / 2 : resident_) / lists, 1, resident_);
  const int64_t pages = (tokens + blocks * SIKV_PAGE_TOKENS - 1) / (blocks * SIKV_PAGE_TOKENS);
  args.chunk =
      static_cast<int>(std::clamp<int64_t>(pages * SIKV_PAGE_TOKENS, kLeastChunk, largest_chunk_));
  args.most_blocks = resident_;
  const auto of_a_row = static_cast<unsigned>((tokens + args.chunk - 1) / args.chunk);
  const auto rows = static_cast<unsigned>(args.pass.num_rows);
  const dim3 grid = pooled ? dim3(std::max(of_a_row * rows, static_cast<unsigned>(resident_)))
                           : dim3(of_a_row, rows, static_cast<unsigned>(args.pass.num_queries));
  if (pooled) {
    cuda::launch_overlapped("self_index find_due", find_due, 1, kDueThreads, 0, stream, args);
  }
  with_kernel(head_dim_, integer_, sets_, args.chunk, [&](auto kernel, size_t bytes) {
    cuda::launch_overlapped("self_index scan_select", kernel, grid, kThreads, bytes, stream, args);
  });
}

}  // namespace sikv::self_index
