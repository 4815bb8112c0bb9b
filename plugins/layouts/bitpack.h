// A row of b-bit codes, b = 1..8: one little-endian bit stream, lowest bit first.
//
//   bit of the row   b*i .. b*i + b-1 = code i, lowest bit first
//   byte of the row  bit / 8, at bit % 8
//
//   b = 2   byte 0: |c3 c3|c2 c2|c1 c1|c0 c0|
//   b = 3   byte 0: |c2 c2|c1 c1 c1|c0 c0 c0|   byte 1: |c5|c4 c4 c4|c3 c3 c3|c2|
#ifndef SIKV_PLUGINS_LAYOUTS_BITPACK_H_
#define SIKV_PLUGINS_LAYOUTS_BITPACK_H_

#include "plugins/abi/sikv_dtype.h"

namespace sikv::bitpack {

SIKV_INLINE constexpr int row_bytes(int bits, int count) { return (bits * count + 7) / 8; }

SIKV_INLINE uint32_t get(const uint8_t* row, int bits, int i) {
  const int first = bits * i, byte = first / 8, shift = first % 8;
  uint32_t word = row[byte];
  if (shift + bits > 8) word |= static_cast<uint32_t>(row[byte + 1]) << 8;
  return word >> shift & ((1u << bits) - 1u);
}

SIKV_INLINE void set(uint8_t* row, int bits, int i, uint32_t code) {
  const int first = bits * i, byte = first / 8, shift = first % 8;
  const uint32_t mask = ((1u << bits) - 1u) << shift, placed = code << shift;
  row[byte] = static_cast<uint8_t>((row[byte] & ~mask) | placed);
  if (shift + bits > 8) {
    row[byte + 1] = static_cast<uint8_t>((row[byte + 1] & ~(mask >> 8)) | placed >> 8);
  }
}

}  // namespace sikv::bitpack

#endif  // SIKV_PLUGINS_LAYOUTS_BITPACK_H_
