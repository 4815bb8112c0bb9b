// Layout kivi(bits=2,group=32).v1 of keys: min-max groups of one channel over `group` neighbouring
// tokens. (KIVI's values, kiviv, have the bytes of intq: intq_v1.h.)
//
//   MAGNITUDE  token | code 0 | code 1 | ... | code D-1 |           bits * D / 8 bytes, bitpack.h
//   SCALE      group of tokens | scale 0 | zero 0 | scale 1 | ...   D pairs of fp16, minmax.h
//
// A group of tokens starts at a multiple of `group` in the page and is quantised as a whole from
// the tokens it has. D = 128, 2 bits, groups of 32: 32 bytes per token and 512 per 32 tokens = 48.
#ifndef SIKV_PLUGINS_LAYOUTS_KIVI_V1_H_
#define SIKV_PLUGINS_LAYOUTS_KIVI_V1_H_

#include "plugins/layouts/minmax.h"

namespace sikv::kivi {

inline constexpr const char* kFamily = "kivi";
inline constexpr int kVersion = 1;

struct Params {
  int head_dim;
  int bits;   // 2 or 4
  int group;  // tokens that share a row of scales
};

// From a sikv::LayoutView or anything that answers like one.
template <typename View>
Params read_params(const View& layout) {
  return {layout.head_dim(), layout.int_param("bits"), layout.int_param("group")};
}

// Bytes of one token, and of one group of tokens.
SIKV_INLINE constexpr int magnitude_bytes(const Params& p) {
  return bitpack::row_bytes(p.bits, p.head_dim);
}
SIKV_INLINE constexpr int scale_tile_bytes(const Params& p) {
  return p.head_dim * 2 * sikv_dtype_bytes(SIKV_FP16);
}

// First byte of each plane of one page.
struct Page {
  uint8_t* magnitude;
  uint8_t* scale;
};

SIKV_INLINE uint8_t* scale_tile(const Params& p, const Page& page, int token) {
  return page.scale + int64_t{scale_tile_bytes(p)} * (token / p.group);
}

// keys [count, D] are tokens first_token .. of the page; first_token is a multiple of group and
// 1 <= count <= group.
SIKV_INLINE void pack_group(const Params& p, const Page& page, int first_token, int count,
                            const float* keys) {
  uint8_t* scales = scale_tile(p, page, first_token);
  for (int d = 0; d < p.head_dim; ++d) {
    float min = keys[d], max = keys[d];
    for (int t = 1; t < count; ++t) {
      min = fminf(min, keys[t * p.head_dim + d]);
      max = fmaxf(max, keys[t * p.head_dim + d]);
    }
    const minmax::Range range = minmax::store_range(scales, SIKV_FP16, d, min, max, p.bits);
    for (int t = 0; t < count; ++t) {
      uint8_t* row = page.magnitude + int64_t{magnitude_bytes(p)} * (first_token + t);
      bitpack::set(row, p.bits, d, minmax::code_of(keys[t * p.head_dim + d], range, p.bits));
    }
  }
}

SIKV_INLINE void unpack_1(const Params& p, const Page& page, int token, float* key) {
  const uint8_t* row = page.magnitude + int64_t{magnitude_bytes(p)} * token;
  const uint8_t* scales = scale_tile(p, page, token);
  for (int d = 0; d < p.head_dim; ++d) {
    key[d] =
        minmax::value_of(bitpack::get(row, p.bits, d), minmax::load_range(scales, SIKV_FP16, d));
  }
}

}  // namespace sikv::kivi

#endif  // SIKV_PLUGINS_LAYOUTS_KIVI_V1_H_
