#include <algorithm>
#include <cub/block/block_scan.cuh>
#include <memory>

#include "kernels/common/block_flash.cuh"
#include "plugins/sdk/plugin.h"

namespace sikv::gather_attention {
namespace {

// K and V of a chunk, decoded: launches are few where rows are few, and the workspace is bounded.
constexpr int64_t kChunkBytes = int64_t{256} << 20;
constexpr int kMinChunk = 256;

int chunk_tokens(int64_t rows, int dim, int64_t most) {
  const int64_t fit = kChunkBytes / (rows * dim * 2 * static_cast<int64_t>(sizeof(float)));
  return static_cast<int>(std::min(std::max<int64_t>(fit, kMinChunk), std::max<int64_t>(most, 1)));
}

struct Chunk {
  int32_t* slots;   // [B, H, capacity]
  int32_t* counts;  // [B, H]
  float* k;         // [B, H, capacity, D]
  float* v;
};

// The chunk's part of each row's list: entries first .. first + capacity - 1 of the selection, or
// slots with these numbers less the pinned ones. One block a row.
constexpr int kListThreads = 256;
__global__ __launch_bounds__(kListThreads) void list_chunk(
    const __grid_constant__ sikv_cache_view view, sikv_selection selection, int first, int capacity,
    Chunk chunk) {
  using Scan = cub::BlockScan<int, kListThreads>;
  __shared__ typename Scan::TempStorage storage;
  const int row = static_cast<int>(blockIdx.x);
  const int listed = selection.counts[row];
  const bool all = listed == SIKV_SELECT_ALL;
  const int count = min(max((all ? view.encoded_len[row] : listed) - first, 0), capacity);
  int32_t* const out = chunk.slots + int64_t{row} * capacity;
  int kept = 0;
  for (int base = 0; base < count; base += kListThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    int slot = 0;
    bool keep = i < count;
    if (keep) {
      slot = all ? first + i : selection.slots[int64_t{row} * selection.capacity + first + i];
      keep = !(all && view.pinned_capacity > 0 && cuda::is_pinned(view, row, slot));
    }
    int before, total;
    Scan(storage).ExclusiveSum(keep ? 1 : 0, before, total);
    if (keep) out[kept + before] = slot;
    kept += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) chunk.counts[row] = kept;
}

class GatherAttention : public Kernel {
 public:
  explicit GatherAttention(const CreateArgs& args)
      : rows_(int64_t{args.shape.max_sequences} * args.shape.num_kv_heads),
        group_(args.group()),
        dim_(args.shape.head_dim),
        max_tokens_(args.shape.max_tokens),
        multiprocessors_(args.device.multiprocessors) {}

  uint64_t plan(int32_t) override {
    tickets_.allocate(rows_);
    return flash_bytes() + chunk_bytes(rows_, chunk_tokens(rows_, dim_, max_tokens_));
  }

  // Every row's list is as long as its selection or, if that is everything, its encoded tokens:
  // only the device knows which, so launches cover both.
  void run(const sikv_attend_args& args, const CacheView& view, Launch launch) override {
    const int rows = view.num_rows(), dim = view.head_dim();
    const int bound = std::max(args.view->max_encoded_len, 1);
    const int capacity = std::min(chunk_tokens(rows_, dim, max_tokens_), bound);
    auto* bytes = static_cast<uint8_t*>(launch.workspace) + flash_bytes();
    Chunk chunk{};
    const int64_t tokens = int64_t{rows} * capacity;
    chunk.k = take<float>(bytes, tokens * dim);
    chunk.v = take<float>(bytes, tokens * dim);
    chunk.slots = take<int32_t>(bytes, tokens);
    chunk.counts = take<int32_t>(bytes, rows);

    cuda::FlashCall call =
        cuda::flash_call(args, launch.workspace, tickets_,
                         cuda::flash_splits(capacity, *args.view, multiprocessors_));
    call.keys = decoded_rows(chunk.k, capacity);
    call.values = decoded_rows(chunk.v, capacity);
    call.listed = cuda::Listed::kDecoded;
    call.selection = {chunk.slots, chunk.counts, capacity, 0};
    const cudaStream_t stream = cuda::stream(launch);
    for (int first = 0; first < bound; first += capacity) {
      list_chunk<<<static_cast<unsigned>(rows), kListThreads, 0, stream>>>(
          *args.view, args.selection, first, capacity, chunk);
      cuda::check_launch("list_chunk", static_cast<unsigned>(rows), kListThreads, stream);
      decode(args.view->key, args.view, chunk, capacity, chunk.k, launch.stream);
      decode(args.view->value, args.view, chunk, capacity, chunk.v, launch.stream);
      call.resume = first > 0;
      call.finish = first + capacity >= bound;
      cuda::launch_attend_any(call, stream);
    }
  }

 private:
  static constexpr uint64_t kAlign = 256;

  template <typename T>
  static T* take(uint8_t*& bytes, int64_t n) {
    T* const at = reinterpret_cast<T*>(bytes);
    bytes += aligned(static_cast<uint64_t>(n) * sizeof(T));
    return at;
  }
  static uint64_t aligned(uint64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
  uint64_t flash_bytes() const {
    return aligned(cuda::flash_workspace_bytes(rows_, group_, dim_, multiprocessors_));
  }
  uint64_t chunk_bytes(int64_t rows, int64_t capacity) const {
    const uint64_t tokens = static_cast<uint64_t>(rows * capacity);
    return 2 * aligned(tokens * static_cast<uint64_t>(dim_) * sizeof(float)) +
           aligned(tokens * sizeof(int32_t)) +
           aligned(static_cast<uint64_t>(rows) * sizeof(int32_t));
  }

  cuda::RowStore decoded_rows(float* data, int capacity) const {
    cuda::RowStore rows;
    rows.head_dim = dim_;
    rows.dtype = SIKV_FP32;
    rows.payload = {reinterpret_cast<uint8_t*>(data),
                    int64_t{capacity} * dim_ * static_cast<int64_t>(sizeof(float))};
    return rows;
  }

  static void decode(const sikv_store_view& store, const sikv_cache_view* view, const Chunk& chunk,
                     int capacity, float* out, void* stream) {
    const sikv_decode_args args{view,         0,  view->num_sequences * view->num_kv_heads,
                                capacity,     0,  chunk.slots,
                                chunk.counts, out};
    sdk::checked([&](sikv_message* why) {
      return store.codec->decode(store.codec_self, &args, stream, why);
    });
  }

  int64_t rows_;
  int group_, dim_, max_tokens_, multiprocessors_;
  cuda::Tickets tickets_;
};

std::unique_ptr<Kernel> make_cuda(const CreateArgs& args) {
  return std::make_unique<GatherAttention>(args);
}

}  // namespace
}  // namespace sikv::gather_attention

SIKV_PLUGIN(
    "gather_attention", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_KERNEL),
    sikv::kernel<sikv::gather_attention::make_cuda, sikv::kNoOptions, sikv::cuda::probe>("cuda"))
