// Layout raw(dtype=fp16).v1: rows as they came. Keys: plane MAGNITUDE, values: plane VALUE_CODE.
//
//   token  | x[0] | x[1] | ... | x[D-1] |     D * 2 (fp16, bf16) or 4 (fp32) bytes, little endian
//
// Also the payload of sign4 and intq at 16 bits.
#ifndef SIKV_PLUGINS_LAYOUTS_RAW_V1_H_
#define SIKV_PLUGINS_LAYOUTS_RAW_V1_H_

#include "plugins/layouts/dtype_name.h"

namespace sikv::raw {

inline constexpr const char* kFamily = "raw";
inline constexpr int kVersion = 1;

struct Params {
  int head_dim;
  int32_t dtype;
};

// From a sikv::LayoutView or anything that answers like one.
template <typename View>
Params read_params(const View& layout) {
  return {layout.head_dim(), dtype_from_name(layout.param("dtype"))};
}

SIKV_INLINE constexpr int row_bytes(const Params& p) {
  return p.head_dim * sikv_dtype_bytes(p.dtype);
}

// `plane` is the first byte of the page, `token` the token in it, x [D].
SIKV_INLINE void pack_1(const Params& p, uint8_t* plane, int token, const float* x) {
  void* row = plane + int64_t{row_bytes(p)} * token;
  for (int d = 0; d < p.head_dim; ++d) sikv_store(row, p.dtype, d, x[d]);
}

SIKV_INLINE void unpack_1(const Params& p, const uint8_t* plane, int token, float* x) {
  const void* row = plane + int64_t{row_bytes(p)} * token;
  for (int d = 0; d < p.head_dim; ++d) x[d] = sikv_load(row, p.dtype, d);
}

}  // namespace sikv::raw

#endif  // SIKV_PLUGINS_LAYOUTS_RAW_V1_H_
