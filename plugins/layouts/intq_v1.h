// Layout intq(bits=2,scale_group=32,scale=fp16).v1 of values: min-max groups of neighbouring
// channels of one token. KIVI's values, kiviv(bits=2,scale_group=32,scale=fp16).v1, have the same
// bytes.
//
//   VALUE_CODE   token | code 0 | code 1 | ... | code D-1 |        bits * D / 8 bytes, bitpack.h
//   VALUE_SCALE  token | scale 0 | zero 0 | scale 1 | zero 1 |...  D / scale_group pairs, minmax.h
//
// intq(bits=16,dtype=fp16).v1 keeps the row in the input type in VALUE_CODE (raw_v1.h) and has no
// VALUE_SCALE. D = 128, bits 2, groups of 32: 32 + 16 bytes per token with fp16 scales, 32 + 8 with
// fp8.
#ifndef SIKV_PLUGINS_LAYOUTS_INTQ_V1_H_
#define SIKV_PLUGINS_LAYOUTS_INTQ_V1_H_

#include "plugins/layouts/minmax.h"
#include "plugins/layouts/raw_v1.h"

namespace sikv::intq {

inline constexpr const char* kFamily = "intq";
inline constexpr const char* kKiviFamily = "kiviv";  // bits 2|4, scale always fp16
inline constexpr int kVersion = 1;

struct Params {
  int head_dim;
  int bits;                         // 2, 4, 8 or 16
  int scale_group = 32;             // channels; unused at 16 bits
  int32_t scale_dtype = SIKV_FP16;  // unused at 16 bits
  int32_t value_dtype = SIKV_FP16;  // of the row at 16 bits
};

// From a sikv::LayoutView (of either family) or anything that answers like one.
template <typename View>
Params read_params(const View& layout) {
  Params p{layout.head_dim(), layout.int_param("bits")};
  if (p.bits == 16) {
    p.value_dtype = dtype_from_name(layout.param("dtype"));
  } else {
    p.scale_group = layout.int_param("scale_group");
    p.scale_dtype = dtype_from_name(layout.param("scale"));
  }
  return p;
}

SIKV_INLINE constexpr bool has_scale(const Params& p) { return p.bits != 16; }

// Bytes of one token in each plane.
SIKV_INLINE constexpr int code_bytes(const Params& p) {
  return p.bits == 16 ? raw::row_bytes({p.head_dim, p.value_dtype})
                      : bitpack::row_bytes(p.bits, p.head_dim);
}
SIKV_INLINE constexpr int scale_bytes(const Params& p) {
  return has_scale(p) ? minmax::scale_row_bytes(p.head_dim, p.scale_group, p.scale_dtype) : 0;
}

// First byte of each plane of one page; scale is null where the layout has none.
struct Page {
  uint8_t* code;
  uint8_t* scale;
};

// value [D]; `token` is the token in the page.
SIKV_INLINE void pack_1(const Params& p, const Page& page, int token, const float* value) {
  if (p.bits == 16) {
    raw::pack_1({p.head_dim, p.value_dtype}, page.code, token, value);
  } else {
    minmax::pack_row(value, p.head_dim, p.bits, p.scale_group, p.scale_dtype,
                     page.code + int64_t{code_bytes(p)} * token,
                     page.scale + int64_t{scale_bytes(p)} * token);
  }
}

SIKV_INLINE void unpack_1(const Params& p, const Page& page, int token, float* value) {
  if (p.bits == 16) {
    raw::unpack_1({p.head_dim, p.value_dtype}, page.code, token, value);
  } else {
    minmax::unpack_row(page.code + int64_t{code_bytes(p)} * token,
                       page.scale + int64_t{scale_bytes(p)} * token, p.head_dim, p.bits,
                       p.scale_group, p.scale_dtype, value);
  }
}

}  // namespace sikv::intq

#endif  // SIKV_PLUGINS_LAYOUTS_INTQ_V1_H_
