// Layouts polar(block=16).v1 of keys and polarv(block=16).v1 of values: rotated rows in polar
// coordinates, angles quantised and one radius for every 16 channels.
//
//   keys     MAGNITUDE    token | level 1 | level 2 | level 3 | level 4 |    bitpack.h
//            level 1      D/2 codes of 4 bits; code i: angle of (y 2i, y 2i+1)
//            level 2..4   D/4, D/8, D/16 codes of 2 bits in one stream behind it; code i of level l:
//                         angle of (r 2i, r 2i+1), the radii of level l - 1
//            SCALE        token | r 0 | r 1 | ... |    radii of level 4, D/16 fp16
//   values   VALUE_CODE   as MAGNITUDE
//            VALUE_SCALE  as SCALE
//
// y = R x, rotation.h. Per token, in fp32:
//   1. radius of a pair (a, b) = sqrt(a^2 + b^2), level by level
//   2. level 1: 16 equal sectors of the circle, counted from the first axis towards the second; an
//      angle on a border is of the sector that begins there, that of (0, 0) is 0
//   3. levels 2 to 4: of two radii the angle is in [0, pi/2]; four codes, those of the Lloyd-Max
//      levels of its density when y is normal, sin(2 psi)^(2^(l-1) - 1). A border belongs to the
//      lower code
//   4. radii to fp16, saturating
// Decode from level 4 down: (a, b) = r (cos, sin) of the code's angle; x = R^T y.
//
// No angle is ever computed: borders are compared through their tangents and levels kept as cosines,
// so that every variant gets the same codes without an arc tangent of its own.
// D = 128: 46 + 16 = 62 bytes per token, 3.875 bits per channel.
#ifndef SIKV_PLUGINS_LAYOUTS_POLAR_V1_H_
#define SIKV_PLUGINS_LAYOUTS_POLAR_V1_H_

#include "plugins/layouts/minmax.h"
#include "plugins/layouts/rotation.h"

namespace sikv::polar {

inline constexpr const char* kKeyFamily = "polar";
inline constexpr const char* kValueFamily = "polarv";
inline constexpr int kVersion = 1;
inline constexpr int kLevels = 4;
inline constexpr int kBlock = 1 << kLevels;  // channels that share a radius
inline constexpr int kSectorBits = 4;        // of level 1
inline constexpr int kAngleBits = 2;         // of the others

struct Params {
  int head_dim;
};

// From a sikv::LayoutView (of either family) or anything that answers like one.
template <typename View>
Params read_params(const View& layout) {
  return {layout.head_dim()};
}

// Bytes of one token.
SIKV_INLINE constexpr int sector_bytes(const Params& p) {
  return bitpack::row_bytes(kSectorBits, p.head_dim / 2);
}
SIKV_INLINE constexpr int code_bytes(const Params& p) {
  return sector_bytes(p) + bitpack::row_bytes(kAngleBits, p.head_dim / kBlock * (kBlock / 2 - 1));
}
SIKV_INLINE constexpr int scale_bytes(const Params& p) {
  return p.head_dim / kBlock * sikv_dtype_bytes(SIKV_FP16);
}

// Where the codes of level 2, 3 or 4 begin in their stream.
SIKV_INLINE constexpr int first_code(const Params& p, int level) {
  return p.head_dim / 2 - (p.head_dim >> (level - 1));
}

// ---- angles -------------------------------------------------------------------------------------

struct Direction {
  float cos;
  float sin;
};

// The middle of a sector of level 1. Codes follow no pattern: a table, where branches would be
// mispredicted.
SIKV_INLINE constexpr float sector_cosine(uint32_t code) {
  constexpr float kCosines[] = {0.980785280f,  0.831469612f,  0.555570233f,  0.195090322f,
                                -0.195090322f, -0.555570233f, -0.831469612f, -0.980785280f,
                                -0.980785280f, -0.831469612f, -0.555570233f, -0.195090322f,
                                0.195090322f,  0.555570233f,  0.831469612f,  0.980785280f};
  return kCosines[code];
}
SIKV_INLINE constexpr Direction sector_direction(uint32_t code) {
  return {sector_cosine(code), sector_cosine((code + 12) % 16)};
}

SIKV_INLINE uint32_t sector_of(float x, float y) {
  constexpr float kTan1 = 0.414213562f, kTan3 = 2.41421356f;  // of pi/8 and 3 pi/8
  // Turned into the first quadrant, along > 0.
  uint32_t quadrant = 0;
  float along = x, across = y;
  if (x <= 0.0f && y > 0.0f) {
    quadrant = 1, along = y, across = -x;
  } else if (x < 0.0f && y <= 0.0f) {
    quadrant = 2, along = -x, across = -y;
  } else if (x >= 0.0f && y < 0.0f) {
    quadrant = 3, along = -y, across = x;
  } else if (!(x > 0.0f)) {
    return 0;
  }
  return 4 * quadrant + (across >= mul_rn(along, kTan1) ? 1u : 0u) + (across >= along ? 1u : 0u) +
         (across >= mul_rn(along, kTan3) ? 1u : 0u);
}

// Levels 2 to 4. Densities are symmetric about pi/4: the sine of a code is the cosine of its mirror.
SIKV_INLINE constexpr float angle_cosine(int level, uint32_t code) {
  constexpr float kCosines2[] = {0.952407975f, 0.805676220f, 0.592356155f, 0.304826265f};
  constexpr float kCosines3[] = {0.910522943f, 0.781091277f, 0.624416865f, 0.413458562f};
  constexpr float kCosines4[] = {0.865717863f, 0.761022103f, 0.648725947f, 0.500532302f};
  return level == 2 ? kCosines2[code] : level == 3 ? kCosines3[code] : kCosines4[code];
}
SIKV_INLINE constexpr Direction angle_direction(int level, uint32_t code) {
  return {angle_cosine(level, code), angle_cosine(level, 3 - code)};
}
// Of the border between codes 0 and 1, half way between their angles.
SIKV_INLINE constexpr float border_tangent(int level) {
  return level == 2 ? 0.510318235f : level == 3 ? 0.613541438f : 0.706479383f;
}

SIKV_INLINE uint32_t angle_of(int level, float first, float second) {
  const float tangent = border_tangent(level);
  return (second > mul_rn(first, tangent) ? 1u : 0u) + (second > first ? 1u : 0u) +
         (mul_rn(second, tangent) > first ? 1u : 0u);
}

SIKV_INLINE float radius_of(float a, float b) {
  return sqrt_rn(add_rn(mul_rn(a, a), mul_rn(b, b)));
}

// ---- a token ------------------------------------------------------------------------------------

// First byte of each plane of one page, of keys or of values.
struct Page {
  uint8_t* code;
  uint8_t* scale;
};

// y [D], rotated, which this uses up; `token` is the token in the page.
SIKV_INLINE void pack_rotated_1(const Params& p, const Page& page, int token, float* y) {
  uint8_t* sectors = page.code + int64_t{code_bytes(p)} * token;
  uint8_t* angles = sectors + sector_bytes(p);
  for (int i = 0; i < p.head_dim / 2; ++i) {
    bitpack::set(sectors, kSectorBits, i, sector_of(y[2 * i], y[2 * i + 1]));
    y[i] = radius_of(y[2 * i], y[2 * i + 1]);
  }
  for (int level = 2; level <= kLevels; ++level) {
    for (int i = 0; i < p.head_dim >> level; ++i) {
      bitpack::set(angles, kAngleBits, first_code(p, level) + i,
                   angle_of(level, y[2 * i], y[2 * i + 1]));
      y[i] = radius_of(y[2 * i], y[2 * i + 1]);
    }
  }
  void* radii = page.scale + int64_t{scale_bytes(p)} * token;
  for (int i = 0; i < p.head_dim / kBlock; ++i) minmax::store_saturated(radii, SIKV_FP16, i, y[i]);
}

// y [D], still rotated: enough for attention with rotated queries, or to sum values.
SIKV_INLINE void unpack_rotated_1(const Params& p, const Page& page, int token, float* y) {
  const uint8_t* sectors = page.code + int64_t{code_bytes(p)} * token;
  const uint8_t* angles = sectors + sector_bytes(p);
  const void* radii = page.scale + int64_t{scale_bytes(p)} * token;
  for (int i = 0; i < p.head_dim / kBlock; ++i) y[i] = sikv_load(radii, SIKV_FP16, i);
  // Backwards, so that a pair never overwrites a radius that is still to be read.
  for (int level = kLevels; level >= 1; --level) {
    for (int i = (p.head_dim >> level) - 1; i >= 0; --i) {
      const Direction to =
          level == 1
              ? sector_direction(bitpack::get(sectors, kSectorBits, i))
              : angle_direction(level, bitpack::get(angles, kAngleBits, first_code(p, level) + i));
      const float radius = y[i];
      y[2 * i] = mul_rn(radius, to.cos);
      y[2 * i + 1] = mul_rn(radius, to.sin);
    }
  }
}

// x [D].
SIKV_INLINE void pack_1(const Params& p, const Page& page, int token, const float* x) {
  float y[kMaxHeadDim];
  for (int d = 0; d < p.head_dim; ++d) y[d] = x[d];
  rotation::forward(y, p.head_dim);
  pack_rotated_1(p, page, token, y);
}

SIKV_INLINE void unpack_1(const Params& p, const Page& page, int token, float* x) {
  unpack_rotated_1(p, page, token, x);
  rotation::inverse(x, p.head_dim);
}

}  // namespace sikv::polar

#endif  // SIKV_PLUGINS_LAYOUTS_POLAR_V1_H_
