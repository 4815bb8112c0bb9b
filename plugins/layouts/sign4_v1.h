// Layout sign4(magnitude_bits=2,scale_group=32,scale=fp16).v1 of keys: signs as the index, min-max
// magnitudes as the payload.
//
//   INDEX_CODE   tiles of 8 tokens, D bytes each (nibble_tile.h): signs of k' = k - mean
//   MAGNITUDE    token | m 0 | m 1 | ... | m D-1 |            bits * D / 8 bytes, bitpack.h
//   SCALE        token | scale 0 | zero 0 | scale 1 |...      D / scale_group pairs, minmax.h
//
//   tables       CODEBOOK [D/4, 16, 4]   mean k' of the prompt's tokens with that nibble
//                KEY_MEAN [D]            mean (0 without centring)
//                KEY_SCALE [D]           alpha = largest |k'| of the prompt, 1 where that is 0
//
// The quantiser sees |k'| / alpha, at most 65504.
// D = 128, 2 bits, fp16 scales: 16 + 32 + 16 bytes per token.
//
//   sign4(magnitude_bits=0).v1              INDEX_CODE alone; keys come back from the codebook
//   sign4(magnitude_bits=16,dtype=fp16).v1  MAGNITUDE is the key in the input type (raw_v1.h), no
//                                           SCALE; the signs are a pure index
#ifndef SIKV_PLUGINS_LAYOUTS_SIGN4_V1_H_
#define SIKV_PLUGINS_LAYOUTS_SIGN4_V1_H_

#include "plugins/layouts/minmax.h"
#include "plugins/layouts/nibble_tile.h"
#include "plugins/layouts/raw_v1.h"

namespace sikv::sign4 {

inline constexpr const char* kFamily = "sign4";
inline constexpr int kVersion = 1;

struct Params {
  int head_dim;
  int magnitude_bits;               // 0, 2, 3, 4, 8 or 16
  int scale_group = 32;             // channels; unused at 0 and 16 bits
  int32_t scale_dtype = SIKV_FP16;  // unused at 0 and 16 bits
  int32_t key_dtype = SIKV_FP16;    // of the row at 16 bits
};

SIKV_INLINE constexpr bool has_magnitude(const Params& p) { return p.magnitude_bits != 0; }
SIKV_INLINE constexpr bool has_scale(const Params& p) {
  return p.magnitude_bits != 0 && p.magnitude_bits != 16;
}

// From a sikv::LayoutView or anything that answers like one.
template <typename View>
Params read_params(const View& layout) {
  Params p{layout.head_dim(), layout.int_param("magnitude_bits")};
  if (p.magnitude_bits == 16) p.key_dtype = dtype_from_name(layout.param("dtype"));
  if (has_scale(p)) {
    p.scale_group = layout.int_param("scale_group");
    p.scale_dtype = dtype_from_name(layout.param("scale"));
  }
  return p;
}

SIKV_INLINE constexpr int index_tile_bytes(const Params& p) {
  return nibble_tile::tile_bytes(p.head_dim);
}
// Bytes of one token in the other planes.
SIKV_INLINE constexpr int magnitude_bytes(const Params& p) {
  return p.magnitude_bits == 16 ? raw::row_bytes({p.head_dim, p.key_dtype})
                                : bitpack::row_bytes(p.magnitude_bits, p.head_dim);
}
SIKV_INLINE constexpr int scale_bytes(const Params& p) {
  return has_scale(p) ? minmax::scale_row_bytes(p.head_dim, p.scale_group, p.scale_dtype) : 0;
}

// First byte of each plane of one page; null where the layout has none.
struct Page {
  uint8_t* index;
  uint8_t* magnitude;
  uint8_t* scale;
};

// Of one (sequence, KV head).
struct Tables {
  const float* codebook;  // [D/4, 16, 4]
  const float* mean;      // [D]
  const float* scale;     // [D]
};

// key [D]; `token` is the token in the page.
SIKV_INLINE void pack_1(const Params& p, const Page& page, int token, const Tables& tables,
                        const float* key) {
  float centred[kMaxHeadDim];
  for (int d = 0; d < p.head_dim; ++d) centred[d] = key[d] - tables.mean[d];
  nibble_tile::pack_signs(page.index, p.head_dim, token, centred);
  if (p.magnitude_bits == 16) {
    raw::pack_1({p.head_dim, p.key_dtype}, page.magnitude, token, key);
  } else if (p.magnitude_bits != 0) {
    // The ceiling keeps a later token finite over an alpha that the prompt left subnormal; scales
    // saturate there in any case.
    for (int d = 0; d < p.head_dim; ++d) {
      const float ratio = div_rn(fabsf(centred[d]), tables.scale[d]);
      centred[d] = fminf(ratio, minmax::largest_finite(SIKV_FP16));
    }
    minmax::pack_row(centred, p.head_dim, p.magnitude_bits, p.scale_group, p.scale_dtype,
                     page.magnitude + int64_t{magnitude_bytes(p)} * token,
                     page.scale + int64_t{scale_bytes(p)} * token);
  }
}

// The key without its mean, which attention may drop: it shifts all logits of a query alike.
// Decodes (sign * magnitude) * alpha. At 16 bits the key is stored whole, so the mean is
// subtracted.
SIKV_INLINE void unpack_centred_1(const Params& p, const Page& page, int token,
                                  const Tables& tables, float* key) {
  if (p.magnitude_bits == 0) {
    for (int g = 0; g < p.head_dim / 4; ++g) {
      const uint32_t nibble = nibble_tile::get(page.index, p.head_dim, token, g);
      for (int i = 0; i < 4; ++i) key[4 * g + i] = tables.codebook[(g * 16 + nibble) * 4 + i];
    }
  } else if (p.magnitude_bits == 16) {
    raw::unpack_1({p.head_dim, p.key_dtype}, page.magnitude, token, key);
    for (int d = 0; d < p.head_dim; ++d) key[d] -= tables.mean[d];
  } else {
    minmax::unpack_row(page.magnitude + int64_t{magnitude_bytes(p)} * token,
                       page.scale + int64_t{scale_bytes(p)} * token, p.head_dim, p.magnitude_bits,
                       p.scale_group, p.scale_dtype, key);
    for (int d = 0; d < p.head_dim; ++d) {
      const float magnitude = mul_rn(key[d], tables.scale[d]);
      const bool positive = nibble_tile::get_sign(page.index, p.head_dim, token, d) != 0;
      key[d] = positive ? magnitude : -magnitude;
    }
  }
}

// The key as it came, up to the quantiser; exact at 16 bits.
SIKV_INLINE void unpack_1(const Params& p, const Page& page, int token, const Tables& tables,
                          float* key) {
  if (p.magnitude_bits == 16) {
    raw::unpack_1({p.head_dim, p.key_dtype}, page.magnitude, token, key);
  } else {
    unpack_centred_1(p, page, token, tables, key);
    for (int d = 0; d < p.head_dim; ++d) key[d] = add_rn(key[d], tables.mean[d]);
  }
}

}  // namespace sikv::sign4

#endif  // SIKV_PLUGINS_LAYOUTS_SIGN4_V1_H_
