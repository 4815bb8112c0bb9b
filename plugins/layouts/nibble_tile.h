// The index plane: the sign nibbles of 256 tokens, in tiles of 8 tokens.
//
//   page   | tile 0 | tile 1 | ... | tile 31 |            32 * D bytes
//   tile   | word 0 | word 1 | ... | word D/4-1 |         D bytes: tokens 8i .. 8i+7
//   word   bit 31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0      (little endian)
//          token 7     6       5       4       3       2       1       0
//   nibble bit i = channel 4g + i of group g is not negative
//
// At D = 128 a tile is one aligned 128-byte line: streamed by a scan, and one line to fetch for a
// single token's signs. Bits of a token behind the last one are unspecified.
#ifndef SIKV_PLUGINS_LAYOUTS_NIBBLE_TILE_H_
#define SIKV_PLUGINS_LAYOUTS_NIBBLE_TILE_H_

#include "plugins/abi/sikv_dtype.h"

namespace sikv::nibble_tile {

inline constexpr int kTileTokens = 8;
inline constexpr int kGroup = 4;  // channels of one nibble

SIKV_INLINE constexpr int tile_bytes(int head_dim) { return head_dim / kGroup * 4; }

SIKV_INLINE constexpr int64_t plane_bytes(int head_dim, int tokens) {
  return int64_t{tile_bytes(head_dim)} * ((tokens + kTileTokens - 1) / kTileTokens);
}

// CODEBOOK [D/4, 16, 4].
SIKV_INLINE constexpr int codebook_floats(int head_dim) { return head_dim / kGroup * 16 * kGroup; }

// Byte of the page that holds the nibble of (token, group); even tokens in its lower half.
SIKV_INLINE constexpr int64_t byte_of(int head_dim, int token, int group) {
  return int64_t{tile_bytes(head_dim)} * (token / kTileTokens) + group * 4 +
         token % kTileTokens / 2;
}

SIKV_INLINE uint32_t get(const uint8_t* page, int head_dim, int token, int group) {
  return static_cast<uint32_t>(page[byte_of(head_dim, token, group)]) >> (token % 2 * 4) & 15u;
}

SIKV_INLINE void set(uint8_t* page, int head_dim, int token, int group, uint32_t nibble) {
  uint8_t* byte = page + byte_of(head_dim, token, group);
  const int shift = token % 2 * 4;
  *byte = static_cast<uint8_t>((*byte & ~(15u << shift)) | nibble << shift);
}

// Zero counts as positive, -0 too: the rule of every sign in the toolkit.
SIKV_INLINE uint32_t sign_bit(float x) { return x >= 0.0f ? 1u : 0u; }

// The nibble of four channels.
SIKV_INLINE uint32_t nibble_of(const float* x) {
  return sign_bit(x[0]) | sign_bit(x[1]) << 1 | sign_bit(x[2]) << 2 | sign_bit(x[3]) << 3;
}

// Writes all nibbles of one token from its centred row x [D].
SIKV_INLINE void pack_signs(uint8_t* page, int head_dim, int token, const float* x) {
  for (int group = 0; group < head_dim / kGroup; ++group) {
    set(page, head_dim, token, group, nibble_of(x + group * kGroup));
  }
}

// Sign bit of one channel.
SIKV_INLINE uint32_t get_sign(const uint8_t* page, int head_dim, int token, int channel) {
  return get(page, head_dim, token, channel / kGroup) >> (channel % kGroup) & 1u;
}

}  // namespace sikv::nibble_tile

#endif  // SIKV_PLUGINS_LAYOUTS_NIBBLE_TILE_H_
