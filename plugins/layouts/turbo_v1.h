// Layouts turbo(form=mse,bits=3).v1 of keys and turbov(bits=2).v1 of values: rotated rows on the
// levels of the unit normal, scaled by their norm; and turbo(form=prod,bits=3,seed=0).v1, which
// spends one of the bits on the signs of a projection of what the levels leave.
//
//   MAGNITUDE, VALUE_CODE   token | code 0 | code 1 | ... | code D-1 |     b * D / 8 bytes, bitpack.h
//   form=prod               ...   | sign 0 | sign 1 | ... | sign D-1 |     D / 8 bytes behind them
//                           b = bits, or bits - 1 with form=prod
//                           code = sign << (b - 1) | level, sign 1 = not negative
//                           sign i of row i of S (kernels/common/sign_sketch.h, from the seed)
//   SCALE, VALUE_SCALE      token | r fp16 |                               2 bytes
//   form=prod               token | r fp16 | residual fp16 |               4 bytes
//
// y = R x, rotation.h. Per token, in fp32 with folded sums (arithmetic.h):
//   1. r = sqrt(sum y^2 / D), that is ||x|| / sqrt(D): the levels are then those of N(0, 1)
//   2. level = number of boundaries strictly below |y| / r; 0 where r = 0
//   3. form=prod: e = y - (sign) level * r, r as stored; signs of S e and residual = ||e||
// Both numbers are rounded to fp16, saturating. Decode: y = (sign) level * r, with form=prod plus the
// sketch's estimate of e; x = R^T y.
// D = 128, keys 3 bits, values 2 bits: 48 + 2 and 32 + 2 bytes per token.
#ifndef SIKV_PLUGINS_LAYOUTS_TURBO_V1_H_
#define SIKV_PLUGINS_LAYOUTS_TURBO_V1_H_

#include "plugins/layouts/rlm4_v1.h"

namespace sikv::turbo {

inline constexpr const char* kKeyFamily = "turbo";
inline constexpr const char* kValueFamily = "turbov";
inline constexpr int kVersion = 1;

struct Params {
  int head_dim;
  int bits;  // 1 to 4, all included
  bool prod = false;
};

// From a sikv::LayoutView (of either family) or anything that answers like one.
template <typename View>
Params read_params(const View& layout) {
  return {layout.head_dim(), layout.int_param("bits"),
          layout.family() == kKeyFamily && layout.param("form") == "prod"};
}

// Of a channel's code, its sign included.
SIKV_INLINE constexpr int channel_bits(const Params& p) { return p.prod ? p.bits - 1 : p.bits; }

// Bytes of one token.
SIKV_INLINE constexpr int code_bytes(const Params& p) {
  return bitpack::row_bytes(p.bits, p.head_dim);
}
SIKV_INLINE constexpr int scale_bytes(const Params& p) { return p.prod ? 4 : 2; }

// Lloyd-Max of the unit normal; those of 2 to 4 bits are rlm4's.
SIKV_INLINE constexpr float level_value(int bits, int level) {
  return bits == 1 ? 0.7979f : rlm4::level_value(bits, level);
}

// First byte of each plane of one page.
struct Page {
  uint8_t* code;
  uint8_t* scale;
};

SIKV_INLINE uint8_t* code_row(const Params& p, const Page& page, int token) {
  return page.code + int64_t{code_bytes(p)} * token;
}
// The signs of form=prod.
SIKV_INLINE uint8_t* sketch_row(const Params& p, const Page& page, int token) {
  return code_row(p, page, token) + bitpack::row_bytes(channel_bits(p), p.head_dim);
}
SIKV_INLINE uint8_t* scale_row(const Params& p, const Page& page, int token) {
  return page.scale + int64_t{scale_bytes(p)} * token;
}

// Steps 1 and 2 of x [D]: writes the codes and r, and to e [D] what they leave of y.
SIKV_INLINE void pack_1(const Params& p, const Page& page, int token, const float* x, float* e) {
  const int bits = channel_bits(p), count = rlm4::num_levels(bits);
  for (int d = 0; d < p.head_dim; ++d) e[d] = x[d];
  rotation::forward(e, p.head_dim);
  const float r = div_rn(norm_of(e, p.head_dim), sqrt_rn(static_cast<float>(p.head_dim)));
  const float stored = minmax::store_saturated(scale_row(p, page, token), SIKV_FP16, 0, r);
  uint8_t* row = code_row(p, page, token);
  for (int d = 0; d < p.head_dim; ++d) {
    const float ratio = r > 0.0f ? div_rn(fabsf(e[d]), r) : 0.0f;
    int level = 0;
    while (level < count - 1 && rlm4::level_boundary(bits, level) < ratio) ++level;
    const uint32_t sign = nibble_tile::sign_bit(e[d]);
    bitpack::set(row, bits, d, sign << (bits - 1) | static_cast<uint32_t>(level));
    const float value = mul_rn(level_value(bits, level), stored);
    e[d] = add_rn(e[d], sign != 0 ? -value : value);
  }
}

// Step 3, besides the signs.
SIKV_INLINE void store_residual(const Params& p, const Page& page, int token, const float* e) {
  minmax::store_saturated(scale_row(p, page, token), SIKV_FP16, 1, norm_of(e, p.head_dim));
}
SIKV_INLINE float load_residual(const Params& p, const Page& page, int token) {
  return sikv_load(scale_row(p, page, token), SIKV_FP16, 1);
}

// y [D], still rotated and without the sketch's part.
SIKV_INLINE void unpack_rotated_1(const Params& p, const Page& page, int token, float* y) {
  const int bits = channel_bits(p), count = rlm4::num_levels(bits);
  const uint8_t* row = code_row(p, page, token);
  const float r = sikv_load(scale_row(p, page, token), SIKV_FP16, 0);
  for (int d = 0; d < p.head_dim; ++d) {
    const int code = static_cast<int>(bitpack::get(row, bits, d));
    const float value = mul_rn(level_value(bits, code % count), r);
    y[d] = code < count ? -value : value;
  }
}

}  // namespace sikv::turbo

#endif  // SIKV_PLUGINS_LAYOUTS_TURBO_V1_H_
