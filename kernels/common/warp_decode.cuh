// Decoding single slots to fp32: a warp to a slot (half a warp at D = 64), a lane to 4 neighbouring
// channels (8 at D = 256), so that planes are read and rows written in whole sectors. A Format says
// what a lane reads.
//
//   struct Format {
//     static constexpr int kDim;
//     // Channels 4 g .. 4 g + 3 of a token of page `page` of the pool.
//     __device__ float4 decode(int row, int64_t page, int token, int g) const;
//     // Once all lanes have theirs: x [kPerLane], groups lane and lane + 32.
//     __device__ void finish(int row, int lane, float4 (&x)[kPerLane]) const;
//   };
#ifndef SIKV_KERNELS_COMMON_WARP_DECODE_CUH_
#define SIKV_KERNELS_COMMON_WARP_DECODE_CUH_

#include <algorithm>

#include "kernels/common/cuda_launch.h"
#include "kernels/common/thread_cache.cuh"
#include "plugins/abi/sikv_codec.h"
#include "plugins/layouts/nibble_tile.h"
#include "plugins/layouts/rotation.h"

namespace sikv::cuda {

// How a row's groups of 4 channels are spread over a warp.
template <int D>
struct LaneShape {
  static constexpr int kGroups = D / 4;
  static constexpr int kPerLane = kGroups > 32 ? 2 : 1;
  static constexpr int kSlots = kGroups <= 16 ? 2 : 1;  // of a warp
  static constexpr int kLanes = 32 / kSlots;            // of a slot; 24 of 32 work at D = 96
};

// What is at codes 4 g .. 4 g + 3 of a row of kBits-bit codes, in the low bits.
template <int kBits>
__device__ inline uint32_t load_codes(const uint8_t* row, int g) {
  if constexpr (kBits == 1) return row[g / 2] >> (g % 2 * 4);
  if constexpr (kBits == 2) return row[g];
  if constexpr (kBits == 3) {
    const uint8_t* at = row + g / 2 * 3 + g % 2;
    return (at[0] | uint32_t{at[1]} << 8) >> (g % 2 * 4);
  }
  if constexpr (kBits == 4) return reinterpret_cast<const uint16_t*>(row)[g];
  return reinterpret_cast<const uint32_t*>(row)[g];
}
// Code i, 0 to 3, of these.
template <int kBits>
__device__ inline uint32_t code_of(uint32_t codes, int i) {
  return codes >> (kBits * i) & ((1u << kBits) - 1u);
}

// The nibble of group g of a token.
template <int D>
__device__ inline uint32_t load_nibble(const uint8_t* index, int token, int g) {
  const auto* tile = reinterpret_cast<const uint32_t*>(
      index + nibble_tile::tile_bytes(D) * (token / nibble_tile::kTileTokens));
  return tile[g] >> (token % nibble_tile::kTileTokens * 4) & 15u;
}

// Changes the signs of numbers whose bit in `nibble` is 0.
__device__ inline float4 apply_nibble(float4 x, uint32_t nibble) {
  return make_float4((nibble & 1) != 0 ? x.x : -x.x, (nibble & 2) != 0 ? x.y : -x.y,
                     (nibble & 4) != 0 ? x.z : -x.z, (nibble & 8) != 0 ? x.w : -x.w);
}

__device__ inline float4 add_each(float4 a, float4 b) {
  return make_float4(add_rn(a.x, b.x), add_rn(a.y, b.y), add_rn(a.z, b.z), add_rn(a.w, b.w));
}

// x <- R^T x over the lanes of a slot: hadamard of plugins/layouts/rotation.h, then the signs.
template <int D>
__device__ inline void unrotate_lanes(int lane, float4 (&x)[LaneShape<D>::kPerLane]) {
  using Shape = LaneShape<D>;
  constexpr int kBlock = rotation::block(D);
#pragma unroll
  for (int p = 0; p < Shape::kPerLane; ++p) {
    float4 v = x[p];
    v = make_float4(add_rn(v.x, v.y), add_rn(v.x, -v.y), add_rn(v.z, v.w), add_rn(v.z, -v.w));
    v = make_float4(add_rn(v.x, v.z), add_rn(v.y, v.w), add_rn(v.x, -v.z), add_rn(v.y, -v.w));
#pragma unroll
    for (int mask = 1; mask < 32 && 4 * mask < kBlock; mask *= 2) {
      const bool upper = (lane & mask) != 0;
      const auto step = [&](float own) {
        const float other = __shfl_xor_sync(~0u, own, mask);
        return upper ? add_rn(other, -own) : add_rn(own, other);
      };
      v = make_float4(step(v.x), step(v.y), step(v.z), step(v.w));
    }
    x[p] = v;
  }
  if constexpr (Shape::kPerLane == 2) {
    const float4 a = x[0], b = x[1];
    x[0] = add_each(a, b);
    x[1] = add_each(a, make_float4(-b.x, -b.y, -b.z, -b.w));
  }
  struct Signs {
    uint32_t positive[D / 32];
  };
  constexpr Signs kSigns = [] {
    Signs signs{};
    for (int d = 0; d < D; ++d) {
      if (rotation::sign(d) > 0.0f) signs.positive[d / 32] |= 1u << (d % 32);
    }
    return signs;
  }();
#pragma unroll
  for (int p = 0; p < Shape::kPerLane; ++p) {
    const int g = lane + 32 * p;
    uint32_t nibble = 0;
#pragma unroll
    for (int w = 0; w < D / 32; ++w) {
      if (g / 8 == w) nibble = kSigns.positive[w] >> (g % 8 * 4);
    }
    constexpr float kNorm = rotation::norm(kBlock);
    const float4 v = make_float4(mul_rn(x[p].x, kNorm), mul_rn(x[p].y, kNorm),
                                 mul_rn(x[p].z, kNorm), mul_rn(x[p].w, kNorm));
    x[p] = apply_nibble(v, nibble);
  }
}

inline constexpr int kDecodeBatch = 4;  // slots (twice as many at D = 64) of a warp at a time

template <typename Format>
__global__ void __launch_bounds__(128) decode_slots(const __grid_constant__ sikv_cache_view view,
                                                    const __grid_constant__ sikv_decode_args args,
                                                    const __grid_constant__ Format format) {
  constexpr int D = Format::kDim;
  using Shape = LaneShape<D>;
  const int i_row = static_cast<int>(blockIdx.y), row = args.first_row + i_row;
  const int warp = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int warps = static_cast<int>(gridDim.x * blockDim.x) / 32;
  const int thread = static_cast<int>(threadIdx.x) % 32;
  const int lane = thread % Shape::kLanes, sub = thread / Shape::kLanes;
  const int count = args.counts[i_row];
  const int32_t* slots = args.slots + int64_t{i_row} * args.capacity;
  const int batch = kDecodeBatch * Shape::kSlots;
  // All lanes of a warp go on together: what they have is exchanged. A few slots at a time: each is
  // three dependent reads.
  for (int first = warp * batch; first < count; first += warps * batch) {
    int slot[kDecodeBatch];
    bool valid[kDecodeBatch];
#pragma unroll
    for (int k = 0; k < kDecodeBatch; ++k) {
      const int i = first + k * Shape::kSlots + sub;
      valid[k] = i < count && lane < Shape::kGroups;
      slot[k] = valid[k] ? slots[i] : 0;
    }
    int64_t page[kDecodeBatch];
#pragma unroll
    for (int k = 0; k < kDecodeBatch; ++k) {
      page[k] = valid[k] ? page_number(view, row, slot[k] / SIKV_PAGE_TOKENS) : 0;
    }
    float4 x[kDecodeBatch][Shape::kPerLane] = {};
#pragma unroll
    for (int k = 0; k < kDecodeBatch; ++k) {
      if (!valid[k]) continue;
#pragma unroll
      for (int p = 0; p < Shape::kPerLane; ++p) {
        x[k][p] = format.decode(row, page[k], slot[k] % SIKV_PAGE_TOKENS, lane + 32 * p);
      }
    }
#pragma unroll
    for (int k = 0; k < kDecodeBatch; ++k) {
      format.finish(row, lane < Shape::kGroups ? lane : 0, x[k]);
      if (!valid[k]) continue;
      const int i = first + k * Shape::kSlots + sub;
      auto* out = reinterpret_cast<float4*>(args.out + (int64_t{i_row} * args.capacity + i) * D);
#pragma unroll
      for (int p = 0; p < Shape::kPerLane; ++p) out[lane + 32 * p] = x[k][p];
    }
  }
}

template <typename Format>
void launch_decode(const sikv_decode_args& args, const Format& format, cudaStream_t stream) {
  if (args.num_rows == 0 || args.capacity == 0) return;
  constexpr int kSlotsPerBlock = 4 * kDecodeBatch * LaneShape<Format::kDim>::kSlots;
  const int blocks = (args.capacity + kSlotsPerBlock - 1) / kSlotsPerBlock;
  const dim3 grid(std::min(blocks, 1024), args.num_rows);
  decode_slots<Format><<<grid, 128, 0, stream>>>(*args.view, args, format);
  check_launch("decode_slots", grid, 128, stream);
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_WARP_DECODE_CUH_
