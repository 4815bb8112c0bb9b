// Sign nibbles of a warp's tokens to the index plane (plugins/layouts/nibble_tile.h): 8 threads
// with a token each turn their nibbles into the words of a tile, 3 shuffles a word.
#ifndef SIKV_KERNELS_COMMON_WARP_NIBBLES_CUH_
#define SIKV_KERNELS_COMMON_WARP_NIBBLES_CUH_

#include "kernels/common/warp_tile.cuh"
#include "plugins/layouts/nibble_tile.h"

namespace sikv::cuda {

// A thread's signs. Word w holds in nibble j the thread's group j * kWords + w, so that after the
// exchange thread j of 8 holds the words of kWords groups that follow each other.
template <int D>
struct TokenSigns {
  using Shape = TokenShape<D>;
  static constexpr int kWords = Shape::kChannels / 4 / 8;
  uint32_t words[kWords] = {};

  // The signs of the thread's numbers, none of which may be -0: the top bits, one after the other,
  // in one shift each.
  __device__ void set(const float (&x)[Shape::kChannels]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t negative = 0;
#pragma unroll
      for (int bit = 31; bit >= 0; --bit) {
        const int i = (bit / 4 * kWords + w) * 4 + bit % 4;
        negative = __funnelshift_l(__float_as_uint(x[i]), negative, 1);
      }
      words[w] = ~negative;
    }
  }

  // To the tokens of a tile of the page that begins at `index`: `token` is the thread's token in
  // the page, tokens of one tile are 8 neighbours. Nibbles of tokens that are not valid stay as
  // they are. All threads of the warp take part.
  __device__ void store(uint8_t* index, int token, int part, bool valid) {
    constexpr int kParts = Shape::kParts;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int j = lane / kParts % 8;  // the thread's token in the tile
    const uint32_t halves = (j & 4) != 0 ? 0x3276u : 0x5410u;
    const uint32_t bytes = (j & 2) != 0 ? 0x3715u : 0x6240u;
    const uint32_t keep = (j & 1) != 0 ? 0xf0f0f0f0u : 0x0f0f0f0fu;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t x = words[w];
      x = __byte_perm(x, __shfl_xor_sync(~0u, x, 4 * kParts), halves);
      x = __byte_perm(x, __shfl_xor_sync(~0u, x, 2 * kParts), bytes);
      const uint32_t other = __shfl_xor_sync(~0u, x, kParts);
      x = (x & keep) | (((j & 1) != 0 ? other >> 4 : other << 4) & ~keep);
      words[w] = x;
    }

    // Tokens of the tile that belong to the call.
    const uint32_t voters = __ballot_sync(~0u, valid && part == 0);
    uint32_t tokens = 0;
    if constexpr (kParts == 1) {
      tokens = voters >> (lane & ~7) & 0xffu;
    } else {
      for (int i = 0; i < 8; ++i) tokens |= (voters >> ((lane & ~15) + 2 * i) & 1u) << i;
    }
    if (tokens == 0) return;
    uint8_t* tile = index + nibble_tile::tile_bytes(D) * (token / nibble_tile::kTileTokens);
    if (tokens != 0xffu) {  // the first or last tile of the call
      uint32_t mask = 0;
      for (int i = 0; i < 8; ++i) mask |= (tokens >> i & 1u) != 0 ? 15u << (4 * i) : 0u;
      for (int w = 0; w < kWords; ++w) {
        auto* word = reinterpret_cast<uint32_t*>(tile) + group(w, j, part);
        *word = (*word & ~mask) | (words[w] & mask);
      }
    } else if constexpr (kParts == 1 && kWords == 4) {
      reinterpret_cast<uint4*>(tile)[j] = make_uint4(words[0], words[1], words[2], words[3]);
    } else if constexpr (kParts == 1 && kWords == 2) {
      reinterpret_cast<uint2*>(tile)[j] = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        reinterpret_cast<uint32_t*>(tile)[group(w, j, part)] = words[w];
      }
    }
  }

 private:
  // Group whose word `w` of thread j is after the exchange.
  __device__ static int group(int w, int j, int part) {
    return (j * kWords + w) * Shape::kParts + part;
  }
};

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_WARP_NIBBLES_CUH_
