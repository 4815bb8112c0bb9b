#include "kernels/sparse_flash/sparse_flash_absorb.h"

#include <algorithm>
#include <string>

#include "kernels/sparse_flash/sparse_flash_absorb.cuh"
#include "selectors/self_index/self_index.h"
#include "selectors/self_index/self_index_tables.h"

namespace sikv::sparse_flash {
namespace {

// Offsets in a share are 16 bits, and so few that counts of 16 bits are enough.
constexpr int kLargestChunk = 32768;
// Below this the tables cost more than the scan.
constexpr int kLeastChunk = 1024;
constexpr int kStaticShared =
    4 << 10;  // bytes of a block, and what the system takes of it, or less

}  // namespace

Absorbed::Absorbed(const Options& options, const sikv_shape& shape, const sikv_device& device,
                   const LayoutView& key_layout, const cuda::RowStore& keys,
                   const cuda::RowStore& values)
    : shape_(shape), multiprocessors_(device.multiprocessors) {
  const self_index::Config config(options);
  budget_ = config.budget;
  rotated_ = self_index::is_rotated(key_layout);
  const int group = shape.num_query_heads / shape.num_kv_heads;
  if (!config.integer_scores() || config.rerank > 1 || config.pooled()) {
    throw Refused(
        "it absorbs self_index with tables: 6bit, group: mean, weighting: none, rerank: 1 and "
        "scan_every: 1");
  }
  if (!cuda::tiles_read(keys, values, group) || shape.dtype == SIKV_FP32) {
    throw Refused(
        "it absorbs self_index over rot_lm of 3 + 2 bits or sign_vq + intq of 2 + 2 bits, head_dim "
        "128, up to 8 query heads per KV head, and fp16 or bf16");
  }
  cuda::check(
      cudaDeviceGetAttribute(&shared_, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.ordinal),
      "asking for shared memory");
  int block = 0;
  cuda::check(
      cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.ordinal),
      "asking for shared memory");
  const int rows = shape.max_sequences * shape.num_kv_heads;
  const Launch largest = sized(rows, shape.max_tokens);
  if (largest.chunk > kLargestChunk || static_cast<int>(largest.shared) + kStaticShared > block) {
    throw Refused("the scores of a row do not fit into the GPU's shared memory");
  }
  cuda::with_tiles(keys, values, [&](auto of_keys, auto of_values) {
    using Keys = typename decltype(of_keys)::type;
    using Values = typename decltype(of_values)::type;
    cuda::check(
        cudaFuncSetAttribute(scan_attend<Keys, Values>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             block - kStaticShared),
        "cudaFuncSetAttribute of scan_attend");
  });
  const size_t bytes = static_cast<size_t>(rows) * sizeof(self_index::TeamState);
  cuda::check(cudaMalloc(&teams_, bytes), "cudaMalloc of a kernel's counters");
  cuda::check(cudaMemset(teams_, 0, bytes), "cudaMemset of a kernel's counters");
}

Absorbed::~Absorbed() { cudaFree(teams_); }

// As many blocks a row as the GPU holds at a time, one to three a multiprocessor.
Absorbed::Launch Absorbed::sized(int rows, int64_t tokens) const {
  Launch launch{};
  for (int resident = cuda::kResident; resident > 0; --resident) {
    const int64_t shares = std::clamp(multiprocessors_ * resident / rows, 1, cuda::kMaxSplits);
    const int64_t pages = (tokens + shares * SIKV_PAGE_TOKENS - 1) / (shares * SIKV_PAGE_TOKENS);
    launch.chunk = static_cast<int>(std::max<int64_t>(pages * SIKV_PAGE_TOKENS, kLeastChunk));
    launch.shares =
        static_cast<int>(std::max<int64_t>((tokens + launch.chunk - 1) / launch.chunk, 1));
    launch.selected =
        static_cast<int>(std::min<int64_t>(launch.chunk, budget_.tokens(shape_.max_tokens)));
    launch.shared = scan_attend_shared_bytes<cuda::CodeKeys<cuda::TileKeys::kLevels3>>(
        launch.selected, launch.chunk);
    if ((static_cast<int>(launch.shared) + kStaticShared) * resident <= shared_) break;
  }
  return launch;
}

void Absorbed::run(const sikv_attend_args& args, const cuda::Tickets& tickets, void* workspace,
                   cudaStream_t stream) const {
  const sikv_cache_view& view = *args.view;
  const int rows = view.num_sequences * view.num_kv_heads;
  const Launch launch = sized(rows, std::max(view.max_encoded_len, 1));
  const cuda::Splits exact = cuda::flash_splits(1, view, multiprocessors_);
  ScanAttendCall call{};
  call.flash = cuda::flash_call(args, workspace, tickets, {launch.shares, exact.exact});
  call.flash.keys = cuda::key_rows(view.key);
  call.flash.values = cuda::value_rows(view.value);
  self_index::ScanArgs& scan = call.scan;
  scan.view = view;
  scan.index = cuda::plane_of(view.key, SIKV_INDEX_CODE);
  scan.codebook = cuda::table_of(view.key, SIKV_CODEBOOK);
  scan.chunk = launch.chunk;
  scan.slots = args.selection.slots;
  scan.capacity = args.selection.capacity;
  scan.found = args.selection.counts;
  scan.step.budget_count = budget_.count;
  scan.step.budget_fraction = budget_.fraction;
  scan.step.rerank = 1;
  scan.step.six_bit = true;
  scan.step.rotated = rotated_;
  scan.step.q = args.q;
  scan.step.q_stride = int64_t{args.num_query_heads} * view.head_dim;
  scan.step.group = call.flash.group;
  scan.step.scale = args.scale;
  scan.step.teams = teams_;
  call.most_selected = launch.selected;
  call.balanced = getenv("SIKV_BAL") != nullptr;
  const dim3 grid(static_cast<unsigned>(rows * call.flash.splits()));
  cuda::with_tiles(call.flash.keys, call.flash.values, [&](auto of_keys, auto of_values) {
    using Keys = typename decltype(of_keys)::type;
    using Values = typename decltype(of_values)::type;
    cuda::launch_overlapped("scan_attend", scan_attend<Keys, Values>, grid, cuda::kFlashThreads,
                            launch.shared, stream, call);
  });
}

}  // namespace sikv::sparse_flash
