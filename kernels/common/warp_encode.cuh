// Encoding rows of K or V token by token: the kernel that brings tokens to threads, and its launch.
// A Format says what happens to a token.
//
//   struct Format {
//     static constexpr int kDim;             // D
//     static constexpr int kTableFloats;     // of a row's tables in shared memory
//     __device__ void load_tables(const sikv_cache_view& view, int row, int lane, float* tables)
//         const;                             // by the warp
//     __device__ void encode(const Token& token, const float* tables, float (&x)[channels]) const;
//   };
//
// A warp owns some chunks of 32 neighbouring slots (16 from D = 128 on) of one (sequence, KV head),
// chunks that begin at multiples of that: a tile of nibbles has one writer. Neighbouring warps take
// the heads of the same tokens, which lie together in memory.
#ifndef SIKV_KERNELS_COMMON_WARP_ENCODE_CUH_
#define SIKV_KERNELS_COMMON_WARP_ENCODE_CUH_

#include <algorithm>

#include "kernels/common/cuda_launch.h"
#include "kernels/common/warp_tile.cuh"

namespace sikv::cuda {

// Where the token of a thread goes. `valid` is false for slots outside of the call.
struct Token {
  int row;
  int64_t page;  // number in the pool
  int slot;      // in the page
  int part;      // of the row, where two threads share a token
  bool valid;
  int valid_begin, valid_end;  // tokens of the warp's tile that are valid
  const uint8_t* tile;         // the rows as they came, in shared memory
  int tile_stride;
  int32_t dtype;  // of the rows
};

struct EncodeRows {
  sikv_rows rows;
  const int32_t* first_slot;  // device; [B, H]
  sikv_fault_what what;
  bool aligned;
  int chunks_per_warp;
  int ranges;  // of chunks_per_warp chunks, of one row
};

// Warps of the largest block: 128 registers a thread for up to 64 numbers, 168 for more.
template <int D>
inline constexpr int kEncodeWarps = TokenShape<D>::kChannels <= 64 ? 16 : 12;

template <typename Format>
__global__ void __launch_bounds__(32 * kEncodeWarps<Format::kDim>)
    encode_rows(const __grid_constant__ sikv_cache_view view,
                const __grid_constant__ EncodeRows call, const __grid_constant__ Format format) {
  constexpr int D = Format::kDim;
  using Shape = TokenShape<D>;
  extern __shared__ __align__(16) uint8_t shared[];
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int heads = view.num_kv_heads;
  const int flat = static_cast<int>(blockIdx.x) * warps + warp;
  const int h = flat % heads, range = flat / heads, b = static_cast<int>(blockIdx.y);
  if (range >= call.ranges) return;
  const int count = call.rows.count[b];
  if (count <= 0) return;
  const int row = b * heads + h;
  const int first_slot = call.first_slot[row];
  const int first_chunk = first_slot / Shape::kTokens + range * call.chunks_per_warp;
  const int end_chunk =
      min(first_chunk + call.chunks_per_warp, (first_slot + count - 1) / Shape::kTokens + 1);
  if (first_chunk >= end_chunk) return;

  const int32_t dtype = call.rows.dtype;
  const int tile_size = tile_bytes<D>(dtype);
  constexpr int kTableBytes = (Format::kTableFloats * 4 + 15) / 16 * 16;
  uint8_t* own = shared + warp * (2 * tile_size + kTableBytes);
  auto* tables = reinterpret_cast<float*>(own + 2 * tile_size);
  const int64_t first_row = call.rows.first[b];

  // Tokens of a chunk that belong to the call.
  const auto begin_of = [&](int chunk) { return max(first_slot - chunk * Shape::kTokens, 0); };
  const auto end_of = [&](int chunk) {
    return min(first_slot + count - chunk * Shape::kTokens, Shape::kTokens);
  };
  TileSource source{
      row_address(call.rows, first_row + (int64_t{first_chunk} * Shape::kTokens - first_slot), 0,
                  h),
      call.rows.token_stride * sikv_dtype_bytes(dtype), call.aligned};
  const int64_t chunk_bytes = source.stride * Shape::kTokens;
  const auto stage = [&](int chunk) {  // chunks in turn
    stage_tile<D>(dtype, source, begin_of(chunk), end_of(chunk),
                  own + (chunk - first_chunk) % 2 * tile_size, lane);
    source.first += chunk_bytes;
    commit_copies();
  };

  stage(first_chunk);
  format.load_tables(view, row, lane, tables);
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    if (chunk + 1 < end_chunk) {
      stage(chunk + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncwarp();
    const int in_tile = lane / Shape::kParts;
    const int slot = chunk * Shape::kTokens + in_tile;
    Token token;
    token.row = row;
    token.page = page_number(view, row, slot / SIKV_PAGE_TOKENS);
    token.slot = slot % SIKV_PAGE_TOKENS;
    token.part = lane % Shape::kParts;
    token.valid_begin = begin_of(chunk);
    token.valid_end = end_of(chunk);
    token.valid = in_tile >= token.valid_begin && in_tile < token.valid_end;
    token.tile = own + (chunk - first_chunk) % 2 * tile_size;
    token.tile_stride = tile_row_bytes(D, dtype);
    token.dtype = dtype;
    const uint8_t* from = token.tile + in_tile * token.tile_stride;
    float x[Shape::kChannels];
    if (!load_row<D>(dtype, from, token.part, x) && token.valid) {
      report_row(view, call.what, b, h, position_of(view, row, slot), dtype, from, D);
    }
    format.encode(token, tables, x);
    __syncwarp();  // the tile is free again
  }
}

// Launches encode_rows. Long prompts give a warp 512 tokens, so that all chunks but the first are
// copied behind the work on the one before; a page of decode gives it one chunk, so that a batch of
// 8 fills the GPU. Tried on an H100 with rot_lm: warps of a block that keep step, for the sake of
// the instruction cache (a body has some 2000 instructions), took 15% longer; 4 warps to a block
// 3%.
template <typename Format>
void launch_encode(const sikv_cache_view& view, const sikv_rows& rows, const int32_t* first_slot,
                   sikv_fault_what what, const Format& format, cudaStream_t stream) {
  if (rows.max_count <= 0 || view.num_sequences == 0) return;
  constexpr int D = Format::kDim;
  constexpr int kTableBytes = (Format::kTableFloats * 4 + 15) / 16 * 16;
  const int warp_bytes = 2 * tile_bytes<D>(rows.dtype) + kTableBytes;
  const bool is_long = rows.max_count > 1024;
  // Blocks get smaller where an SM has less shared memory than the H100's 228 KB.
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  check(
      cudaFuncSetAttribute(encode_rows<Format>, cudaFuncAttributeMaxDynamicSharedMemorySize, limit),
      "raising the shared memory of encode_rows");
  const int warps = std::min(is_long ? kEncodeWarps<D> : 4, std::max(limit / warp_bytes, 1));

  const int chunks = (rows.max_count - 1) / TokenShape<D>::kTokens + 2;
  const int chunks_per_warp = is_long ? 512 / TokenShape<D>::kTokens : 1;
  EncodeRows call{rows, first_slot, what, is_aligned(rows), chunks_per_warp, 0};
  call.ranges = (chunks + call.chunks_per_warp - 1) / call.chunks_per_warp;
  const int units = call.ranges * view.num_kv_heads;
  const dim3 grid((units + warps - 1) / warps, view.num_sequences);
  const dim3 block(32 * warps);
  encode_rows<Format><<<grid, block, warps * warp_bytes, stream>>>(view, call, format);
  check_launch("encode_rows", grid, block, stream);
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_WARP_ENCODE_CUH_
