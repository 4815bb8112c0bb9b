// Scan, select and attend in one launch: what self_index does with 6-bit tables and without a
// reranker (selectors/self_index), followed in the same block by attention over what the block has
// selected of its share.
//
//   blocks    | row 0: share 0 .. S-1 | row 1: share 0 .. S-1 | ... | exact splits of all rows |
//   a share   tables -> scores + histogram -> merged histogram -> cut -> its list -> attention
//
// No list is read back, queries are prepared while the first codes come, and exact tokens are
// attended to beside the scan. The blocks of a row wait for each other: no more scan than the GPU
// holds at a time, and exact splits come last, so that they take no place from them.
#ifndef SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_ABSORB_CUH_
#define SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_ABSORB_CUH_

#include "kernels/common/block_tiles.cuh"
#include "selectors/self_index/self_index_scan.cuh"

namespace sikv::sparse_flash {

struct ScanAttendCall {
  cuda::FlashCall flash;  // encoded_splits: shares of a row
  self_index::ScanArgs scan;
  int most_selected;  // of a share
  bool balanced;
};

// Selected tokens of a share.
struct ShareList {
  const uint16_t* offsets;
  int first;

  __device__ int slot(int i) const { return first + offsets[i]; }
  __device__ bool counts(const cuda::FlashCall&, int, int) const { return true; }
};

struct RowList {
  const int32_t* slots;

  __device__ int slot(int i) const { return __ldcg(slots + i); }
  __device__ bool counts(const cuda::FlashCall&, int, int) const { return true; }
};

// Dynamic shared memory:
//   queries | list [most_selected] | tables, histogram, keys [chunk]; later states, then the merge
constexpr size_t scan_attend_list_bytes(int most_selected) {
  return (sizeof(uint16_t) * static_cast<size_t>(most_selected) + 15) / 16 * 16;
}
template <typename Keys>
constexpr size_t scan_attend_shared_bytes(int most_selected, int chunk) {
  constexpr size_t kStates = std::max(cuda::WarpStates::bytes(8, Keys::kDim),
                                      cuda::kFlashWarps * sizeof(cuda::MergeShared));
  return cuda::query_bytes<Keys, 1>() + scan_attend_list_bytes(most_selected) +
         std::max(kStates,
                  static_cast<size_t>(self_index::scan_shared_bytes<Keys::kDim>(true, 1, chunk)));
}

template <typename Keys, typename Values>
__global__ void __launch_bounds__(cuda::kFlashThreads, cuda::kResident)
    scan_attend(const __grid_constant__ ScanAttendCall args) {
  constexpr int kDim = Keys::kDim, kThreads = cuda::kFlashThreads;
  const cuda::FlashCall& call = args.flash;
  const self_index::ScanArgs& scan = args.scan;
  extern __shared__ uint4 dynamic[];
  auto* const shared = reinterpret_cast<uint8_t*>(dynamic);
  auto* const query = reinterpret_cast<typename Keys::Shared*>(shared);
  auto* const list = reinterpret_cast<uint16_t*>(shared + cuda::query_bytes<Keys, 1>());
  auto* const rest = reinterpret_cast<uint8_t*>(list) + scan_attend_list_bytes(args.most_selected);
  const int rows = call.view.num_sequences * call.view.num_kv_heads;
  const int block = static_cast<int>(blockIdx.x), shares = rows * call.encoded_splits;
  const bool exact = block >= shares;
  const int row = exact ? (block - shares) / call.exact_splits : block / call.encoded_splits;
  cuda::wait_for_launch_before();
  cuda::start_next_launch();
  if (exact) {
    const int part = (block - shares) % call.exact_splits;
    if (call.view.dtype == SIKV_FP16) {
      cuda::attend_exact_tiles<__half, kDim, 1>(call, row, part, rest);
    } else {
      cuda::attend_exact_tiles<__nv_bfloat16, kDim, 1>(call, row, part, rest);
    }
  } else {
    const int share = block % call.encoded_splits, first = share * scan.chunk;
    __shared__ self_index::ScanShared<kDim, kThreads> scratch;
    __shared__ float mean[kDim], shift[8];
    cuda::WarpStates states(reinterpret_cast<float*>(rest), 8, kDim);
    states.shift = shift;
    int32_t* const slots = scan.slots + int64_t{row} * scan.capacity;
    const self_index::Scanned scanned = self_index::scan_row<kDim, kThreads, true>(
        scan, row, share, scan.chunk, reinterpret_cast<uint4*>(rest), mean, scratch,
        [&] { cuda::prepare_tile_queries<Keys, 1>(call, row, query, states); },
        [&](uint32_t place, uint32_t part_first, int i) {
          slots[place] = first + i;
          list[place - part_first] = static_cast<uint16_t>(i);
        });
    const bool any = scanned.active && scanned.k > 0;
    const int count = any ? static_cast<int>(scanned.part.count) : 0;
    if (share == 0 && threadIdx.x == 0) scan.found[row] = static_cast<int32_t>(scanned.k);
    __syncthreads();
    if (!any && threadIdx.x < 8) shift[threadIdx.x] = 0.0f;
    if (args.balanced) {
      self_index::Team team = scanned.team;
      if (any) team.barrier();
      const cuda::Range range =
          any ? cuda::part_of(static_cast<int>(scanned.k), share, team.size(), cuda::kTileTokens)
              : cuda::Range{0, 0};
      cuda::TileWalk<Keys, Values, 1, RowList> walk(call, row, {slots}, range);
      walk.run(query, states);
    } else {
      cuda::TileWalk<Keys, Values, 1, ShareList> walk(call, row, {list, first}, {0, count});
      walk.run(query, states);
    }
    __syncthreads();
    cuda::store_split(call, row, share, 0, call.group, states);
  }
  const int splits = call.encoded_splits + call.exact_splits;
  if (!cuda::finish_row(call, row, splits, reinterpret_cast<float*>(rest))) return;
  const int len = call.view.encoded_len[row];
  const int size = max((len + scan.chunk - 1) / scan.chunk, 1);
  if (size > 1) {
    self_index::Team::clear(scan.step.teams[row], size, self_index::ScanShape<kDim>::kBins);
  }
}

}  // namespace sikv::sparse_flash

#endif  // SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_ABSORB_CUH_
