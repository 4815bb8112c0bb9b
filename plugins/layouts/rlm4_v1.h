// Layouts rlm4(bits=3).v1 of keys and rlm4v(bits=2).v1 of values: rotated, sign-first Lloyd-Max.
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
#ifndef SIKV_PLUGINS_LAYOUTS_RLM4_V1_H_
#define SIKV_PLUGINS_LAYOUTS_RLM4_V1_H_

#include "plugins/layouts/minmax.h"
#include "plugins/layouts/nibble_tile.h"
#include "plugins/layouts/rotation.h"

namespace sikv::rlm4 {

inline constexpr const char* kKeyFamily = "rlm4";
inline constexpr const char* kValueFamily = "rlm4v";
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

// First byte of each plane of one page.
struct KeyPage {
  uint8_t* index;
  uint8_t* magnitude;
  uint8_t* scale;
};

SIKV_INLINE float token_scale(const uint8_t* scale_plane, int token) {
  return sikv_load(scale_plane, SIKV_FP16, token);
}

// key [D], mean [D]; `token` is the token in the page.
SIKV_INLINE void pack_1(const Params& p, const KeyPage& page, int token, const float* mean,
                        const float* key) {
  float y[kMaxHeadDim];
  uint8_t levels[kMaxHeadDim];
  rotate_centred(p, key, mean, y);
  minmax::store_saturated(page.scale, SIKV_FP16, token, quantise(p, y, levels));
  nibble_tile::pack_signs(page.index, p.head_dim, token, y);
  uint8_t* row = page.magnitude + int64_t{magnitude_bytes(p)} * token;
  for (int d = 0; d < p.head_dim; ++d) bitpack::set(row, level_bits(p), d, levels[d]);
}

// y [D], still rotated and centred: enough for attention with rotated queries.
SIKV_INLINE void unpack_rotated_1(const Params& p, const KeyPage& page, int token, float* y) {
  const uint8_t* row = page.magnitude + int64_t{magnitude_bytes(p)} * token;
  const float scale = token_scale(page.scale, token);
  for (int d = 0; d < p.head_dim; ++d) {
    y[d] = dequantise(p, nibble_tile::get_sign(page.index, p.head_dim, token, d),
                      bitpack::get(row, level_bits(p), d), scale);
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
};

SIKV_INLINE void pack_1(const Params& p, const ValuePage& page, int token, const float* mean,
                        const float* value) {
  float y[kMaxHeadDim];
  uint8_t levels[kMaxHeadDim];
  rotate_centred(p, value, mean, y);
  minmax::store_saturated(page.scale, SIKV_FP16, token, quantise(p, y, levels));
  uint8_t* row = page.code + int64_t{value_code_bytes(p)} * token;
  for (int d = 0; d < p.head_dim; ++d) {
    const uint32_t sign = nibble_tile::sign_bit(y[d]);
    bitpack::set(row, p.bits, d, sign << level_bits(p) | levels[d]);
  }
}

// y [D], still rotated and centred: sum these and undo rotation and mean once per output.
SIKV_INLINE void unpack_rotated_1(const Params& p, const ValuePage& page, int token, float* y) {
  const uint8_t* row = page.code + int64_t{value_code_bytes(p)} * token;
  const float scale = token_scale(page.scale, token);
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
