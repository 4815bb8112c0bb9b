// Layout qjl(rows=2,seed=0).v1 of keys: the signs of a random projection of a key, and its norm.
//
//   MAGNITUDE   token | sign 0 | sign 1 | ... | sign m-1 |    m / 8 bytes, bitpack.h; m = rows * D
//               sign i: row i of S is not turned away from the key (kernels/common/sign_sketch.h,
//               S from the seed)
//   SCALE       token | ||k|| fp16, saturating |              2 bytes
//
// Decode: the sketch's estimate of a vector of that norm.
// D = 128, rows 2: 32 + 2 bytes per token.
#ifndef SIKV_PLUGINS_LAYOUTS_QJL_V1_H_
#define SIKV_PLUGINS_LAYOUTS_QJL_V1_H_

#include "plugins/layouts/bitpack.h"

namespace sikv::qjl {

inline constexpr const char* kFamily = "qjl";
inline constexpr int kVersion = 1;
inline constexpr int kScaleBytes = 2;

struct Params {
  int head_dim;
  int rows;  // of the projection, per channel
};

// From a sikv::LayoutView or anything that answers like one.
template <typename View>
Params read_params(const View& layout) {
  return {layout.head_dim(), layout.int_param("rows")};
}

SIKV_INLINE constexpr int num_signs(const Params& p) { return p.rows * p.head_dim; }
// Bytes of one token.
SIKV_INLINE constexpr int sign_bytes(const Params& p) {
  return bitpack::row_bytes(1, num_signs(p));
}

}  // namespace sikv::qjl

#endif  // SIKV_PLUGINS_LAYOUTS_QJL_V1_H_
