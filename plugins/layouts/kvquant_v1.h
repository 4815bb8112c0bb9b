// Layouts kvquant(bits=3).v1 of keys and kvquantv(bits=3).v1 of values: non-uniform levels within
// the range of a channel (keys) or of a token (values), and a few numbers of each token as they are.
//
//   keys     MAGNITUDE    token | code 0 | code 1 | ... | code D-1 |   bits * D / 8 bytes, bitpack.h
//            SCALE        token | entry 0 | ... | entry E-1 |          3 * E bytes, E = ceil(D / 64)
//            tables       CODEBOOK [2^bits] levels, ascending
//                         KEY_MEAN [D] centre of the channel's range, KEY_SCALE [D] half its width
//   values   VALUE_CODE   as MAGNITUDE
//            VALUE_SCALE  token | centre | half | entry 0 | ... |      two fp16 and the entries
//            tables       CODEBOOK [2^bits]
//   entry    | channel, 1 byte | number, fp16 |                        little endian, at any address
//
// Per token, in fp32:
//   1. values: the narrowest range that leaves out E numbers (of equally narrow ones that of fewest
//      small numbers left out); its centre and half its width to fp16, saturating, and what follows
//      sees the stored ones. Keys: the channel's tables
//   2. the E numbers that lie furthest outside of their range (or least far inside) become entries;
//      of equal ones the lower channel
//   3. code = number of midpoints between levels that are below (x - centre) / half; of 0 where
//      half = 0. So what lies outside and is no entry gets an outermost level
// Decode: level * half + centre; entries replace what that gives.
// D = 128, 3 bits: 48 + 6 bytes per token of keys, 48 + 10 of values.
#ifndef SIKV_PLUGINS_LAYOUTS_KVQUANT_V1_H_
#define SIKV_PLUGINS_LAYOUTS_KVQUANT_V1_H_

#include "plugins/layouts/minmax.h"

namespace sikv::kvquant {

inline constexpr const char* kKeyFamily = "kvquant";
inline constexpr const char* kValueFamily = "kvquantv";
inline constexpr int kVersion = 1;
inline constexpr int kMaxLevels = 32;

struct Params {
  int head_dim;
  int bits;  // 2 to 5
};

// From a sikv::LayoutView (of either family) or anything that answers like one.
template <typename View>
Params read_params(const View& layout) {
  return {layout.head_dim(), layout.int_param("bits")};
}

SIKV_INLINE constexpr int num_levels(const Params& p) { return 1 << p.bits; }
SIKV_INLINE constexpr int num_entries(const Params& p) { return (p.head_dim + 63) / 64; }
inline constexpr int kMaxEntries = (kMaxHeadDim + 63) / 64;

// Bytes of one token.
inline constexpr int kEntryBytes = 3;
inline constexpr int kRangeBytes = 4;
SIKV_INLINE constexpr int code_bytes(const Params& p) {
  return bitpack::row_bytes(p.bits, p.head_dim);
}
SIKV_INLINE constexpr int key_scale_bytes(const Params& p) { return kEntryBytes * num_entries(p); }
SIKV_INLINE constexpr int value_scale_bytes(const Params& p) {
  return kRangeBytes + kEntryBytes * num_entries(p);
}

// ---- numbers at any address ---------------------------------------------------------------------

// Rounds x to fp16, saturating, and returns what was stored.
SIKV_INLINE float store_half(uint8_t* bytes, float x) {
  uint16_t word;
  const float stored = minmax::store_saturated(&word, SIKV_FP16, 0, x);
  bytes[0] = static_cast<uint8_t>(word & 0xff);
  bytes[1] = static_cast<uint8_t>(word >> 8);
  return stored;
}

SIKV_INLINE float load_half(const uint8_t* bytes) {
  return sikv_fp16_to_float(static_cast<uint16_t>(bytes[0] | bytes[1] << 8));
}

// ---- a row x [D] --------------------------------------------------------------------------------

// Of channel d: centre[d * step] and half[d * step], step 0 where all channels share one.
struct Ranges {
  const float* centre;
  const float* half;
  int step;
};

struct Extent {
  float lowest;
  float highest;
};

// Zeros are +0.
SIKV_INLINE float centre_of(const Extent& extent) {
  return mul_rn(0.5f, add_rn(add_rn(extent.lowest, extent.highest), 0.0f));
}
SIKV_INLINE float half_of(const Extent& extent) {
  return mul_rn(0.5f, add_rn(extent.highest - extent.lowest, 0.0f));
}

SIKV_INLINE float normalised(float x, float centre, float half) {
  return half > 0.0f ? div_rn(x - centre, half) : 0.0f;
}

// Step 2.
SIKV_INLINE void pack_entries(const Params& p, const Ranges& ranges, const float* x,
                              uint8_t* entries) {
  float outside[kMaxHeadDim];
  for (int d = 0; d < p.head_dim; ++d) {
    outside[d] = fabsf(x[d] - ranges.centre[d * ranges.step]) - ranges.half[d * ranges.step];
  }
  for (int e = 0; e < num_entries(p); ++e) {
    int furthest = 0;
    for (int d = 1; d < p.head_dim; ++d) {
      if (outside[d] > outside[furthest]) furthest = d;
    }
    outside[furthest] = -HUGE_VALF;
    entries[kEntryBytes * e] = static_cast<uint8_t>(furthest);
    store_half(entries + kEntryBytes * e + 1, x[furthest]);
  }
}

// Step 3. Boundaries run in the outer loop: the inner one is a vector's work.
SIKV_INLINE void pack_codes(const Params& p, const Ranges& ranges, const float* levels,
                            const float* x, uint8_t* row) {
  float position[kMaxHeadDim];
  int32_t code[kMaxHeadDim];
  for (int d = 0; d < p.head_dim; ++d) {
    position[d] = normalised(x[d], ranges.centre[d * ranges.step], ranges.half[d * ranges.step]);
    code[d] = 0;
  }
  for (int i = 0; i + 1 < num_levels(p); ++i) {
    const float boundary = mul_rn(0.5f, add_rn(levels[i], levels[i + 1]));
    for (int d = 0; d < p.head_dim; ++d) code[d] += boundary < position[d] ? 1 : 0;
  }
  for (int d = 0; d < p.head_dim; ++d) {
    bitpack::set(row, p.bits, d, static_cast<uint32_t>(code[d]));
  }
}

SIKV_INLINE void unpack_row(const Params& p, const Ranges& ranges, const float* levels,
                            const uint8_t* row, const uint8_t* entries, float* x) {
  for (int d = 0; d < p.head_dim; ++d) {
    const float level = levels[bitpack::get(row, p.bits, d)];
    x[d] = add_rn(mul_rn(level, ranges.half[d * ranges.step]), ranges.centre[d * ranges.step]);
  }
  for (int e = 0; e < num_entries(p); ++e) {
    x[entries[kEntryBytes * e]] = load_half(entries + kEntryBytes * e + 1);
  }
}

// First byte of each plane of one page, of keys or of values.
struct Page {
  uint8_t* code;
  uint8_t* scale;
};

// ---- keys ---------------------------------------------------------------------------------------

// Of one (sequence, KV head).
struct KeyTables {
  const float* levels;  // [2^bits]
  const float* centre;  // [D]
  const float* half;    // [D]
};

// key [D]; `token` is the token in the page.
SIKV_INLINE void pack_1(const Params& p, const Page& page, int token, const KeyTables& tables,
                        const float* key) {
  const Ranges ranges = {tables.centre, tables.half, 1};
  pack_entries(p, ranges, key, page.scale + int64_t{key_scale_bytes(p)} * token);
  pack_codes(p, ranges, tables.levels, key, page.code + int64_t{code_bytes(p)} * token);
}

SIKV_INLINE void unpack_1(const Params& p, const Page& page, int token, const KeyTables& tables,
                          float* key) {
  unpack_row(p, {tables.centre, tables.half, 1}, tables.levels,
             page.code + int64_t{code_bytes(p)} * token,
             page.scale + int64_t{key_scale_bytes(p)} * token, key);
}

// ---- values -------------------------------------------------------------------------------------

// The range of step 1, before it is stored.
SIKV_INLINE Extent narrowest(const Params& p, const float* value) {
  const int count = num_entries(p);
  // So far, from the outermost inwards.
  float smallest[kMaxEntries + 1] = {}, largest[kMaxEntries + 1] = {};
  for (int i = 0; i <= count; ++i) {
    smallest[i] = HUGE_VALF;
    largest[i] = -HUGE_VALF;
  }
  for (int d = 0; d < p.head_dim; ++d) {
    float low = value[d], high = value[d];
    for (int i = 0; i <= count; ++i) {
      const float smaller = fminf(smallest[i], low), larger = fmaxf(largest[i], high);
      low = fmaxf(smallest[i], low);
      high = fminf(largest[i], high);
      smallest[i] = smaller;
      largest[i] = larger;
    }
  }
  Extent best = {smallest[0], largest[count]};
  for (int i = 1; i <= count; ++i) {
    const Extent other = {smallest[i], largest[count - i]};
    if (other.highest - other.lowest < best.highest - best.lowest) best = other;
  }
  return best;
}

SIKV_INLINE void pack_1(const Params& p, const Page& page, int token, const float* levels,
                        const float* value) {
  uint8_t* scale = page.scale + int64_t{value_scale_bytes(p)} * token;
  const Extent extent = narrowest(p, value);
  const float centre = store_half(scale, centre_of(extent));
  const float half = store_half(scale + kRangeBytes / 2, half_of(extent));
  const Ranges ranges = {&centre, &half, 0};
  pack_entries(p, ranges, value, scale + kRangeBytes);
  pack_codes(p, ranges, levels, value, page.code + int64_t{code_bytes(p)} * token);
}

SIKV_INLINE void unpack_1(const Params& p, const Page& page, int token, const float* levels,
                          float* value) {
  const uint8_t* scale = page.scale + int64_t{value_scale_bytes(p)} * token;
  const float centre = load_half(scale), half = load_half(scale + kRangeBytes / 2);
  unpack_row(p, {&centre, &half, 0}, levels, page.code + int64_t{code_bytes(p)} * token,
             scale + kRangeBytes, value);
}

}  // namespace sikv::kvquant

#endif  // SIKV_PLUGINS_LAYOUTS_KVQUANT_V1_H_
