// Asymmetric min-max quantiser of a group of numbers: x ~ code * scale + zero.
//
//   codes    bits * n / 8 bytes, a bit stream (bitpack.h)
//   scales   | scale 0 | zero 0 | scale 1 | zero 1 | ...    one pair per group, in the scale type
//
// Of a group, all in fp32, every step rounded:
//   1. scale = (max - min) / (2^bits - 1), zero = min
//   2. both are rounded to the scale type, saturating at its largest finite value; 0 is stored as
//      +0 (which of -0 and +0 is the smaller is up to the machine's minimum)
//   3. code = (x - zero) / scale, clamped to [0, 2^bits - 1], rounded to nearest, ties to even
// A stored scale of 0 (max == min, or a range that the scale type rounds away) gives code 0. Codes
// are made against the stored pair, so its rounding costs range and not bias.
#ifndef SIKV_PLUGINS_LAYOUTS_MINMAX_H_
#define SIKV_PLUGINS_LAYOUTS_MINMAX_H_

#include "plugins/layouts/arithmetic.h"
#include "plugins/layouts/bitpack.h"

namespace sikv::minmax {

// A stored pair, widened to fp32 (exact).
struct Range {
  float scale;
  float zero;
};

SIKV_INLINE constexpr float largest_finite(int32_t dtype) {
  return dtype == SIKV_FP16       ? 65504.0f
         : dtype == SIKV_FP8_E4M3 ? 448.0f
         : dtype == SIKV_FP8_E5M2 ? 57344.0f
                                  : 3.38953139e38f; /* bf16, which also fits fp32 */
}

// Rounds x to `dtype`, saturating, writes it as element i and returns what was stored.
SIKV_INLINE float store_saturated(void* data, int32_t dtype, int64_t i, float x) {
  const float limit = largest_finite(dtype);
  sikv_store(data, dtype, i, x > limit ? limit : x < -limit ? -limit : x);
  return sikv_load(data, dtype, i);
}

SIKV_INLINE Range load_range(const void* scales, int32_t scale_dtype, int64_t group) {
  return {sikv_load(scales, scale_dtype, 2 * group), sikv_load(scales, scale_dtype, 2 * group + 1)};
}

// Steps 1 and 2: stores and returns the pair of group `group`, from its extremes.
SIKV_INLINE Range store_range(void* scales, int32_t scale_dtype, int64_t group, float min,
                              float max, int bits) {
  const float scale = div_rn(max - min, static_cast<float>((1 << bits) - 1));
  return {store_saturated(scales, scale_dtype, 2 * group, add_rn(scale, 0.0f)),
          store_saturated(scales, scale_dtype, 2 * group + 1, add_rn(min, 0.0f))};
}

// Step 3.
SIKV_INLINE uint32_t code_of(float x, Range range, int bits) {
  if (range.scale == 0.0f) return 0;
  const float top = static_cast<float>((1 << bits) - 1);
  const float position = div_rn(x - range.zero, range.scale);
  return static_cast<uint32_t>(nearbyintf(fminf(fmaxf(position, 0.0f), top)));
}

SIKV_INLINE float value_of(uint32_t code, Range range) {
  return add_rn(mul_rn(static_cast<float>(code), range.scale), range.zero);
}

// ---- a token's row x [n], in groups of `group` neighbouring channels --------------------------

SIKV_INLINE constexpr int scale_row_bytes(int n, int group, int32_t scale_dtype) {
  return n / group * 2 * sikv_dtype_bytes(scale_dtype);
}

SIKV_INLINE void pack_row(const float* x, int n, int bits, int group, int32_t scale_dtype,
                          uint8_t* codes, void* scales) {
  for (int first = 0; first < n; first += group) {
    float min = x[first], max = x[first];
    for (int i = first + 1; i < first + group; ++i) {
      min = fminf(min, x[i]);
      max = fmaxf(max, x[i]);
    }
    const Range range = store_range(scales, scale_dtype, first / group, min, max, bits);
    for (int i = first; i < first + group; ++i) {
      bitpack::set(codes, bits, i, code_of(x[i], range, bits));
    }
  }
}

SIKV_INLINE void unpack_row(const uint8_t* codes, const void* scales, int n, int bits, int group,
                            int32_t scale_dtype, float* x) {
  for (int first = 0; first < n; first += group) {
    const Range range = load_range(scales, scale_dtype, first / group);
    for (int i = first; i < first + group; ++i) {
      x[i] = value_of(bitpack::get(codes, bits, i), range);
    }
  }
}

}  // namespace sikv::minmax

#endif  // SIKV_PLUGINS_LAYOUTS_MINMAX_H_
