#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "framework/cache/cache_ops.h"
#include "framework/device/cuda_error.h"
#include "framework/device/cuda_fault.cuh"

namespace sikv {
namespace {

constexpr int kPageTokens = SIKV_PAGE_TOKENS;
constexpr int kThreads = 256;
constexpr int kStageBytes = 32 << 10;

// ---- one token per sequence -----------------------------------------------------------------

union Packet {  // 16 bytes of the input
  uint4 bits;
  float fp32[4];
  __half fp16[8];
  __nv_bfloat16 bf16[8];
};

template <int32_t kDtype>
constexpr int kPacketElements = kDtype == SIKV_FP32 ? 4 : 8;

template <int32_t kDtype>
__device__ float element(const Packet& packet, int i) {
  if constexpr (kDtype == SIKV_FP32) return packet.fp32[i];
  if constexpr (kDtype == SIKV_BF16) return __bfloat162float(packet.bf16[i]);
  return __half2float(packet.fp16[i]);
}

// One block per sequence.
template <int32_t kDtype>
__global__ void append_tokens(const __grid_constant__ LayerArrays layer, const uint4* k,
                              const uint4* v) {
  const sikv_cache_view& view = layer.view;
  const int b = blockIdx.x, D = view.head_dim;
  const int packets = view.num_kv_heads * D / kPacketElements<kDtype>;
  const int len = layer.tail_len[b];
  for (int side = 0; side < 2; ++side) {
    const uint4* const from = (side == 0 ? k : v) + int64_t{b} * packets;
    uint4* const to =
        static_cast<uint4*>(const_cast<void*>(side == 0 ? view.tail_k : view.tail_v)) +
        (int64_t{b} * view.tail_capacity + len) * packets;
    for (int i = threadIdx.x; i < packets; i += kThreads) {
      Packet packet;
      packet.bits = from[i];
      to[i] = packet.bits;
      for (int j = 0; j < kPacketElements<kDtype>; ++j) {
        const float x = element<kDtype>(packet, j);
        if (is_storable(x)) continue;
        const int channel = i * kPacketElements<kDtype> + j;
        report_fault(view.fault,
                     {side == 0 ? SIKV_FAULT_K : SIKV_FAULT_V, view.layer, b, channel / D,
                      layer.next_position[b * view.num_kv_heads] + len, channel % D, x, 0});
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) layer.tail_len[b] = len + 1;
}

// ---- flush ----------------------------------------------------------------------------------

// One block per sequence.
__global__ void count_flush(const __grid_constant__ LayerArrays layer,
                            const __grid_constant__ FlushArrays flush) {
  const sikv_cache_view& view = layer.view;
  const int b = blockIdx.x;
  const int count = layer.tail_len[b] == kPageTokens ? kPageTokens : 0;
  if (threadIdx.x == 0) flush.count[b] = count;
  for (int h = 0; h < view.num_kv_heads; ++h) {
    const int row = b * view.num_kv_heads + h;
    const int first = layer.encoded_len[row], next = layer.next_position[row];
    if (layer.positions != nullptr && count > 0) {
      layer.positions[int64_t{row} * view.max_pages * kPageTokens + first + threadIdx.x] =
          next + threadIdx.x;
    }
    __syncthreads();  // all have read
    if (threadIdx.x == 0) {
      flush.first_slot[row] = first;
      layer.next_position[row] = next + count;
      layer.encoded_len[row] = first + count;
    }
  }
}

__global__ void empty_tails(int32_t* tail_len, const int32_t* count, int sequences) {
  const int b = blockIdx.x * kThreads + threadIdx.x;
  if (b < sequences && count[b] > 0) tail_len[b] = 0;
}

__global__ void sum_attended(const __grid_constant__ sikv_cache_view view, const int32_t* counts,
                             unsigned long long* sums) {
  const int row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (row >= view.num_sequences * view.num_kv_heads) return;
  const int pinned = view.pinned_len[row], count = counts[row];
  const int encoded = count == SIKV_SELECT_ALL ? view.encoded_len[row] - pinned : count;
  atomicAdd(sums, static_cast<unsigned long long>(encoded));
  atomicAdd(sums + 1,
            static_cast<unsigned long long>(pinned + view.tail_len[row / view.num_kv_heads]));
  atomicAdd(sums + 2, 1ull);
}

// ---- prefill --------------------------------------------------------------------------------

template <typename T>
__device__ const T* row_address(const sikv_rows& rows, int sequence, int token, int head) {
  return static_cast<const T*>(rows.data) +
         (rows.first[sequence] + int64_t{token}) * rows.token_stride + head * rows.head_stride;
}

// One block per token of a tail: (256, B).
template <typename T>
__global__ void fill_tail_tokens(const __grid_constant__ sikv_cache_view view,
                                 const __grid_constant__ sikv_rows k,
                                 const __grid_constant__ sikv_rows v) {
  const int b = blockIdx.y, count = k.count[b], D = view.head_dim;
  const int t = count / kPageTokens * kPageTokens + blockIdx.x;
  if (t >= count) return;
  const int64_t at =
      (int64_t{b} * view.tail_capacity + blockIdx.x) * view.num_kv_heads * view.head_dim;
  T* const to_k = static_cast<T*>(const_cast<void*>(view.tail_k)) + at;
  T* const to_v = static_cast<T*>(const_cast<void*>(view.tail_v)) + at;
  for (int i = threadIdx.x; i < view.num_kv_heads * D; i += kThreads) {
    to_k[i] = row_address<T>(k, b, t, i / D)[i % D];
    to_v[i] = row_address<T>(v, b, t, i / D)[i % D];
  }
}

// One block per pinned token: (pinned_capacity, B * H).
template <typename T>
__global__ void copy_pinned_tokens(const __grid_constant__ sikv_cache_view view,
                                   const __grid_constant__ sikv_rows k,
                                   const __grid_constant__ sikv_rows v) {
  const int row = blockIdx.y, i = blockIdx.x, D = view.head_dim;
  if (i >= view.pinned_len[row]) return;
  const int64_t pin = int64_t{row} * view.pinned_capacity + i;
  const int b = row / view.num_kv_heads, h = row % view.num_kv_heads;
  const int slot = view.pinned_slots[pin];
  T* const to_k = static_cast<T*>(const_cast<void*>(view.pinned_k)) + pin * D;
  T* const to_v = static_cast<T*>(const_cast<void*>(view.pinned_v)) + pin * D;
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    to_k[d] = row_address<T>(k, b, slot, h)[d];
    to_v[d] = row_address<T>(v, b, slot, h)[d];
  }
}

// ---- eviction -------------------------------------------------------------------------------

struct PlaneBytes {
  uint8_t* base;
  int64_t page_stride;
  int organisation, tile_tokens, bytes_per_tile;
  int stride;  // from one tile to the next
};
struct RowPlanes {
  PlaneBytes planes[2 * SIKV_MAX_PLANES];
  const int32_t* pages;  // of the row
};

__device__ uint8_t* tile_of(const PlaneBytes& plane, const int32_t* pages, int slot) {
  return plane.base + pages[slot / kPageTokens] * plane.page_stride +
         int64_t{slot % kPageTokens / plane.tile_tokens} * plane.stride;
}

// Whole tiles (single tokens where a plane is PER_TOKEN or IN_LINE) of T units.
template <typename T>
__device__ void move_tiles(const PlaneBytes& plane, const int32_t* pages, const int32_t* keep,
                           int count, T* stage) {
  const int tile = plane.tile_tokens, units = plane.bytes_per_tile / static_cast<int>(sizeof(T));
  const int tiles = (count + tile - 1) / tile;
  const int chunk = max(1, kStageBytes / plane.bytes_per_tile);
  for (int first = 0; first < tiles; first += chunk) {
    const int n = min(chunk, tiles - first) * units;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const int to = (first + i / units) * tile;
      stage[i] = reinterpret_cast<const T*>(tile_of(plane, pages, keep[to]))[i % units];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const int to = (first + i / units) * tile;
      reinterpret_cast<T*>(tile_of(plane, pages, to))[i % units] = stage[i];
    }
    __syncthreads();
  }
}

// Nibbles one by one into words of 8 tokens; what lies past the last token stays.
__device__ void move_nibbles(const PlaneBytes& plane, const int32_t* pages, const int32_t* keep,
                             int count, uint32_t* stage) {
  constexpr int kTile = 8;
  const int groups = plane.bytes_per_tile / 4, tiles = (count + kTile - 1) / kTile;
  const int chunk = max(1, kStageBytes / plane.bytes_per_tile);
  const auto word = [&](int slot, int group) {
    return reinterpret_cast<uint32_t*>(tile_of(plane, pages, slot)) + group;
  };
  for (int first = 0; first < tiles; first += chunk) {
    const int n = min(chunk, tiles - first) * groups;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const int tile = first + i / groups, group = i % groups;
      uint32_t bits = *word(tile * kTile, group);
      for (int j = 0; j < kTile && tile * kTile + j < count; ++j) {
        const int from = keep[tile * kTile + j];
        const uint32_t nibble = *word(from, group) >> (from % kTile * 4) & 0xf;
        bits = (bits & ~(0xfu << (j * 4))) | nibble << (j * 4);
      }
      stage[i] = bits;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      *word((first + i / groups) * kTile, i % groups) = stage[i];
    }
    __syncthreads();
  }
}

// One block per plane of one row. Chunks in order: each is read whole before it is written, and
// ascending keep-lists read nothing below what earlier chunks wrote.
__global__ void move_row(const __grid_constant__ RowPlanes row, const int32_t* keep, int count) {
  extern __shared__ uint32_t stage[];
  const PlaneBytes& plane = row.planes[blockIdx.x];
  if (plane.organisation == SIKV_NIBBLE_TILES) {
    move_nibbles(plane, row.pages, keep, count, stage);
  } else if ((plane.bytes_per_tile | plane.stride | reinterpret_cast<uintptr_t>(plane.base)) % 4 ==
             0) {
    move_tiles<uint32_t>(plane, row.pages, keep, count, stage);
  } else {
    move_tiles<uint8_t>(plane, row.pages, keep, count, reinterpret_cast<uint8_t*>(stage));
  }
}

// ---- host -----------------------------------------------------------------------------------

class CudaCacheOps final : public CacheOps {
 public:
  explicit CudaCacheOps(Device& device)
      : device_(device), stream_(static_cast<cudaStream_t>(device.stream())) {}

  void append(const LayerArrays& layer, const void* k, const void* v) override {
    const dim3 grid(static_cast<unsigned>(layer.view.num_sequences));
    const auto launch = [&](auto kernel) {
      kernel<<<grid, kThreads, 0, stream_>>>(layer, static_cast<const uint4*>(k),
                                             static_cast<const uint4*>(v));
    };
    switch (layer.view.dtype) {
      case SIKV_FP32:
        launch(append_tokens<SIKV_FP32>);
        break;
      case SIKV_BF16:
        launch(append_tokens<SIKV_BF16>);
        break;
      default:
        launch(append_tokens<SIKV_FP16>);
    }
    check_cuda_launch("append_tokens", grid, kThreads, stream_);
  }

  void fill_tails(const LayerArrays& layer, const sikv_rows& k, const sikv_rows& v) override {
    const dim3 grid(kPageTokens, static_cast<unsigned>(layer.view.num_sequences));
    if (layer.view.dtype == SIKV_FP32) {
      fill_tail_tokens<uint32_t><<<grid, kThreads, 0, stream_>>>(layer.view, k, v);
    } else {
      fill_tail_tokens<uint16_t><<<grid, kThreads, 0, stream_>>>(layer.view, k, v);
    }
    check_cuda_launch("fill_tail_tokens", grid, kThreads, stream_);
  }

  void copy_pins(const LayerArrays& layer, const sikv_rows& k, const sikv_rows& v) override {
    const sikv_cache_view& view = layer.view;
    if (view.pinned_capacity == 0) return;
    const dim3 grid(static_cast<unsigned>(view.pinned_capacity),
                    static_cast<unsigned>(view.num_sequences * view.num_kv_heads));
    const unsigned threads = 64;
    if (view.dtype == SIKV_FP32) {
      copy_pinned_tokens<uint32_t><<<grid, threads, 0, stream_>>>(view, k, v);
    } else {
      copy_pinned_tokens<uint16_t><<<grid, threads, 0, stream_>>>(view, k, v);
    }
    check_cuda_launch("copy_pinned_tokens", grid, threads, stream_);
  }

  void move_tokens(const LayerArrays& layer, int row, std::span<const int32_t> keep) override {
    if (keep.empty()) return;
    if (keep_.bytes() < keep.size_bytes()) keep_ = DeviceBuffer(device_, keep.size_bytes());
    device_.copy_in(keep_.as<>(), keep.data(), keep.size_bytes());
    RowPlanes planes{};
    planes.pages = layer.view.page_table + int64_t{row} * layer.view.max_pages;
    unsigned count = 0;
    size_t shared = kStageBytes;
    for (const sikv_store_view* store : {&layer.view.key, &layer.view.value}) {
      for (uint32_t p = 0; p < store->layout->num_planes; ++p) {
        const sikv_plane& plane = store->layout->planes[p];
        planes.planes[count++] = {static_cast<uint8_t*>(store->planes[p]),
                                  store->page_stride_bytes[p],
                                  static_cast<int>(plane.organisation),
                                  static_cast<int>(plane.tile_tokens),
                                  static_cast<int>(plane.bytes_per_tile),
                                  static_cast<int>(sikv_tile_stride(store->layout, p))};
        shared = std::max<size_t>(shared, plane.bytes_per_tile);
      }
    }
    move_row<<<count, kThreads, shared, stream_>>>(planes, keep_.as<int32_t>(),
                                                   static_cast<int>(keep.size()));
    check_cuda_launch("move_row", count, kThreads, stream_);
  }

  void begin_flush(const LayerArrays& layer, const FlushArrays& flush) override {
    const dim3 grid(static_cast<unsigned>(layer.view.num_sequences));
    count_flush<<<grid, kPageTokens, 0, stream_>>>(layer, flush);
    check_cuda_launch("count_flush", grid, kPageTokens, stream_);
  }

  void end_flush(const LayerArrays& layer, const FlushArrays& flush) override {
    const int B = layer.view.num_sequences;
    const dim3 grid(static_cast<unsigned>((B + kThreads - 1) / kThreads));
    empty_tails<<<grid, kThreads, 0, stream_>>>(layer.tail_len, flush.count, B);
    check_cuda_launch("empty_tails", grid, kThreads, stream_);
  }

  void count_attended(const LayerArrays& layer, const int32_t* counts, uint64_t* sums) override {
    const int rows = layer.view.num_sequences * layer.view.num_kv_heads;
    const dim3 grid(static_cast<unsigned>((rows + kThreads - 1) / kThreads));
    sum_attended<<<grid, kThreads, 0, stream_>>>(layer.view, counts,
                                                 reinterpret_cast<unsigned long long*>(sums));
    check_cuda_launch("sum_attended", grid, kThreads, stream_);
  }

 private:
  Device& device_;
  cudaStream_t stream_;
  DeviceBuffer keep_;  // the keep-list of the row at work
};

}  // namespace

std::unique_ptr<CacheOps> make_cuda_cache_ops(Device& device) {
  return std::make_unique<CudaCacheOps>(device);
}

}  // namespace sikv
