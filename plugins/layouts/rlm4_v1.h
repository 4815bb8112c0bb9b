// Layouts rlm4(bits=3).v1 of keys and rlm4v(bits=2).v1 of values: rotated, sign-first Lloyd-Max; and
// the same numbers in lines, rlm4line(bits=3).v1 and rlm4vline(bits=2).v1.
//
//   keys     INDEX_CODE   tiles of 8 tokens, D bytes each (nibble_tile.h): signs of y
//            MAGNITUDE    token | level 0 | level 1 | ... |   (bits - 1) * D / 8 bytes, bitpack.h
//            SCALE        token | fp16 |                      2 bytes
//            tables       CODEBOOK [D/4, 16, 4] mean y of the prompt's tokens with that nibble
//                         KEY_MEAN [D]
//   values   VALUE_CODE   token | code 0 | code 1 | ... |     bits * D / 8 bytes, bitpack.h
//                         code = sign << (bits - 1) | level, sign 1 = not negative
//            VALUE_SCALE  token | fp16 |                      2 bytes
//            tables       VALUE_MEAN [D]
//
// y = R (x - mean), rotation.h. Per token, in fp32 with folded sums (arithmetic.h):
//   1. r = sqrt(sum y^2 / D)
//   2. level = number of boundaries strictly below |y| / r; 0 where r = 0
//   3. scale = sum |y| v / sum v^2, v the level's value, to fp16, saturating; 0 where r = 0
// Decode: y = (sign) v * scale, x = R^T y + mean.
// D = 128, keys 3 bits, values 2 bits: 16 + 32 + 2 and 32 + 2 bytes per token.
//
// In lines whoever reads one token finds its key, signs included, and the scale of its value in one
// piece of memory that begins where it is aligned: two DRAM accesses of 64 bytes for key and value
// where the planes take six. The key takes 3 bits, the value any of 2, 3, 4.
//
//   keys     INDEX_CODE   as above
//            MAGNITUDE    line | levels | signs |                              IN_LINE
//            SCALE        line | fp16 |                                        IN_LINE
//   values   VALUE_CODE   as above
//            VALUE_SCALE  line | fp16 |                                        IN_LINE
//   line     | levels D/4 | signs D/8 | key scale 2 | value scale 2 | unspecified |
//            signs        bit i of the stream = channel i is not negative: the nibbles of the index
//   D         64   96  128  256
//   line      32   64   64  128 bytes, so that none crosses a boundary of 64 that it need not
#ifndef SIKV_PLUGINS_LAYOUTS_RLM4_V1_H_
#define SIKV_PLUGINS_LAYOUTS_RLM4_V1_H_

#include "plugins/layouts/minmax.h"
#include "plugins/layouts/nibble_tile.h"
#include "plugins/layouts/rotation.h"

namespace sikv::rlm4 {

inline constexpr const char* kKeyFamily = "rlm4";
inline constexpr const char* kValueFamily = "rlm4v";
inline constexpr const char* kKeyLineFamily = "rlm4line";
inline constexpr const char* kValueLineFamily = "rlm4vline";
inline constexpr int kVersion = 1;
inline constexpr int kScaleBytes = 2;

struct Params {
  int head_dim;
  int bits;  // 2, 3 or 4, the sign included
};

// From a sikv::LayoutView (of either family) or anything that answers like one.
template <typename View>
Params read_params(const View& layout) {
  return {layout.head_dim(), layout.int_param("bits")};
}

SIKV_INLINE constexpr int level_bits(const Params& p) { return p.bits - 1; }
SIKV_INLINE constexpr int num_levels(int bits) { return 1 << (bits - 1); }

SIKV_INLINE constexpr int index_tile_bytes(const Params& p) {
  return nibble_tile::tile_bytes(p.head_dim);
}
// Bytes of one token.
SIKV_INLINE constexpr int magnitude_bytes(const Params& p) {
  return bitpack::row_bytes(level_bits(p), p.head_dim);
}
SIKV_INLINE constexpr int value_code_bytes(const Params& p) {
  return bitpack::row_bytes(p.bits, p.head_dim);
}

// ---- lines --------------------------------------------------------------------------------------

inline constexpr int kLineKeyBits = 3;

SIKV_INLINE constexpr int line_signs(int head_dim) { return head_dim / 4; }
SIKV_INLINE constexpr int line_key_scale(int head_dim) { return head_dim / 8 * 3; }
SIKV_INLINE constexpr int line_value_scale(int head_dim) {
  return line_key_scale(head_dim) + kScaleBytes;
}
SIKV_INLINE constexpr int line_bytes(int head_dim) {
  return (line_value_scale(head_dim) + kScaleBytes + 31) / 32 * 32;
}

// Bytes from one token's scale to the next; `line` is line_bytes where tokens lie in lines, else 0.
SIKV_INLINE constexpr int scale_stride(int line) { return line > 0 ? line : kScaleBytes; }

// Whether a layout is one of these, in planes or in lines.
template <typename View>
bool is_keys(const View& layout) {
  return layout.is(kKeyFamily, kVersion) || layout.is(kKeyLineFamily, kVersion);
}
template <typename View>
bool is_values(const View& layout) {
  return layout.is(kValueFamily, kVersion) || layout.is(kValueLineFamily, kVersion);
}
// Of a layout in lines, else 0.
template <typename View>
int read_line(const View& layout) {
  return layout.is(kKeyLineFamily, kVersion) || layout.is(kValueLineFamily, kVersion)
             ? line_bytes(layout.head_dim())
             : 0;
}

// ---- the quantiser ----------------------------------------------------------------------------

// Lloyd-Max levels of the unit normal, positive half; boundaries are their midpoints.
SIKV_INLINE constexpr float level_value(int bits, int level) {
  constexpr float kLevels2[] = {0.4528f, 1.5104f};
  constexpr float kLevels3[] = {0.2451f, 0.7560f, 1.3439f, 2.1520f};
  constexpr float kLevels4[] = {0.1284f, 0.3880f, 0.6568f, 0.9423f,
                                1.2562f, 1.6180f, 2.0690f, 2.7326f};
  return bits == 2 ? kLevels2[level] : bits == 3 ? kLevels3[level] : kLevels4[level];
}

// Upper end of level `level` < num_levels - 1.
SIKV_INLINE constexpr float level_boundary(int bits, int level) {
  constexpr float kBoundaries2[] = {0.9816f};
  constexpr float kBoundaries3[] = {0.5006f, 1.0500f, 1.7480f};
  constexpr float kBoundaries4[] = {0.2582f, 0.5224f, 0.7996f, 1.0993f, 1.4371f, 1.8435f, 2.4008f};
  return bits == 2 ? kBoundaries2[level] : bits == 3 ? kBoundaries3[level] : kBoundaries4[level];
}

// Steps 1 to 3 of y [D]: writes levels [D] and returns the scale, not yet rounded to fp16.
SIKV_INLINE float quantise(const Params& p, const float* y, uint8_t* levels) {
  float square[kMaxHeadDim] = {};
  for (int d = 0; d < p.head_dim; ++d) square[d] = mul_rn(y[d], y[d]);
  const float r = sqrt_rn(div_rn(sum_folded(square, p.head_dim), static_cast<float>(p.head_dim)));
  float dot[kMaxHeadDim] = {};
  for (int d = 0; d < p.head_dim; ++d) {
    const float ratio = r > 0.0f ? div_rn(fabsf(y[d]), r) : 0.0f;
    int level = 0;
    while (level < num_levels(p.bits) - 1 && level_boundary(p.bits, level) < ratio) ++level;
    const float value = level_value(p.bits, level);
    levels[d] = static_cast<uint8_t>(level);
    dot[d] = mul_rn(fabsf(y[d]), value);
    square[d] = mul_rn(value, value);
  }
  if (!(r > 0.0f)) return 0.0f;
  return div_rn(sum_folded(dot, p.head_dim), sum_folded(square, p.head_dim));
}

SIKV_INLINE float dequantise(const Params& p, uint32_t sign, uint32_t level, float scale) {
  const float y = mul_rn(level_value(p.bits, static_cast<int>(level)), scale);
  return sign != 0 ? y : -y;
}

// y [D] <- R (x - mean).
SIKV_INLINE void rotate_centred(const Params& p, const float* x, const float* mean, float* y) {
  for (int d = 0; d < p.head_dim; ++d) y[d] = x[d] - mean[d];
  rotation::forward(y, p.head_dim);
}

// y [D] <- R^T y + mean.
SIKV_INLINE void unrotate_centred(const Params& p, const float* mean, float* y) {
  rotation::inverse(y, p.head_dim);
  for (int d = 0; d < p.head_dim; ++d) y[d] = add_rn(y[d], mean[d]);
}

// ---- keys ---------------------------------------------------------------------------------------

// First byte of each plane of one page; `line` is line_bytes where tokens lie in lines, else 0.
struct KeyPage {
  uint8_t* index;
  uint8_t* magnitude;
  uint8_t* scale;
  int line = 0;
};

SIKV_INLINE float token_scale(const uint8_t* scale_plane, int token, int line = 0) {
  return sikv_load(scale_plane + int64_t{scale_stride(line)} * token, SIKV_FP16, 0);
}
SIKV_INLINE void store_scale(uint8_t* scale_plane, int token, int line, float scale) {
  minmax::store_saturated(scale_plane + int64_t{scale_stride(line)} * token, SIKV_FP16, 0, scale);
}
// Levels of a token, and in lines its signs behind them.
SIKV_INLINE uint8_t* key_row(const Params& p, const KeyPage& page, int token) {
  return page.magnitude + int64_t{page.line > 0 ? page.line : magnitude_bytes(p)} * token;
}

// key [D], mean [D]; `token` is the token in the page.
SIKV_INLINE void pack_1(const Params& p, const KeyPage& page, int token, const float* mean,
                        const float* key) {
  float y[kMaxHeadDim];
  uint8_t levels[kMaxHeadDim];
  rotate_centred(p, key, mean, y);
  store_scale(page.scale, token, page.line, quantise(p, y, levels));
  nibble_tile::pack_signs(page.index, p.head_dim, token, y);
  uint8_t* row = key_row(p, page, token);
  for (int d = 0; d < p.head_dim; ++d) bitpack::set(row, level_bits(p), d, levels[d]);
  if (page.line == 0) return;
  uint8_t* signs = row + line_signs(p.head_dim);
  for (int d = 0; d < p.head_dim; ++d) bitpack::set(signs, 1, d, nibble_tile::sign_bit(y[d]));
}

// y [D], still rotated and centred: enough for attention with rotated queries.
SIKV_INLINE void unpack_rotated_1(const Params& p, const KeyPage& page, int token, float* y) {
  const uint8_t* row = key_row(p, page, token);
  const uint8_t* signs = row + line_signs(p.head_dim);
  const float scale = token_scale(page.scale, token, page.line);
  for (int d = 0; d < p.head_dim; ++d) {
    const uint32_t sign = page.line > 0 ? bitpack::get(signs, 1, d)
                                        : nibble_tile::get_sign(page.index, p.head_dim, token, d);
    y[d] = dequantise(p, sign, bitpack::get(row, level_bits(p), d), scale);
  }
}

SIKV_INLINE void unpack_1(const Params& p, const KeyPage& page, int token, const float* mean,
                          float* key) {
  unpack_rotated_1(p, page, token, key);
  unrotate_centred(p, mean, key);
}

// ---- values -------------------------------------------------------------------------------------

struct ValuePage {
  uint8_t* code;
  uint8_t* scale;
  int line = 0;  // of the scales
};

SIKV_INLINE void pack_1(const Params& p, const ValuePage& page, int token, const float* mean,
                        const float* value) {
  float y[kMaxHeadDim];
  uint8_t levels[kMaxHeadDim];
  rotate_centred(p, value, mean, y);
  store_scale(page.scale, token, page.line, quantise(p, y, levels));
  uint8_t* row = page.code + int64_t{value_code_bytes(p)} * token;
  for (int d = 0; d < p.head_dim; ++d) {
    const uint32_t sign = nibble_tile::sign_bit(y[d]);
    bitpack::set(row, p.bits, d, sign << level_bits(p) | levels[d]);
  }
}

// y [D], still rotated and centred: sum these and undo rotation and mean once per output.
SIKV_INLINE void unpack_rotated_1(const Params& p, const ValuePage& page, int token, float* y) {
  const uint8_t* row = page.code + int64_t{value_code_bytes(p)} * token;
  const float scale = token_scale(page.scale, token, page.line);
  for (int d = 0; d < p.head_dim; ++d) {
    const uint32_t code = bitpack::get(row, p.bits, d);
    y[d] = dequantise(p, code >> level_bits(p), code & ((1u << level_bits(p)) - 1u), scale);
  }
}

SIKV_INLINE void unpack_1(const Params& p, const ValuePage& page, int token, const float* mean,
                          float* value) {
  unpack_rotated_1(p, page, token, value);
  unrotate_centred(p, mean, value);
}

}  // namespace sikv::rlm4

#endif  // SIKV_PLUGINS_LAYOUTS_RLM4_V1_H_
