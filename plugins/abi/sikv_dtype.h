/* Element types that cross the plugin boundary, and their scalar conversions.
 *
 *   type       sign exp man   largest      notes
 *   fp32        1    8   23   3.4e38
 *   fp16        1    5   10   65504
 *   bf16        1    8    7   3.4e38
 *   fp8_e4m3    1    4    3   448          OCP "FN": no infinity, NaN is S.1111.111
 *   fp8_e5m2    1    5    2   57344        IEEE-like
 *
 * Every narrowing rounds to nearest, ties to even. The fp8 types saturate at their largest value
 * (they hold scales: an infinite scale would poison a whole group); fp16 and bf16 overflow to
 * infinity as IEEE does. NaN stays NaN. Usable from C11, C++ and CUDA device code.
 */
#ifndef SIKV_PLUGINS_ABI_SIKV_DTYPE_H_
#define SIKV_PLUGINS_ABI_SIKV_DTYPE_H_

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SIKV_INLINE static __host__ __device__ inline
#else
#define SIKV_INLINE static inline
#endif

#ifdef __cplusplus
#define SIKV_CONSTEXPR constexpr
#else
#define SIKV_CONSTEXPR
#endif

typedef enum sikv_dtype {
  SIKV_FP32 = 0,
  SIKV_FP16 = 1,
  SIKV_BF16 = 2,
  SIKV_FP8_E4M3 = 3,
  SIKV_FP8_E5M2 = 4
} sikv_dtype;

/* Bytes of one element; 0 for an unknown type. */
SIKV_INLINE SIKV_CONSTEXPR int sikv_dtype_bytes(int32_t dtype) {
  return dtype == SIKV_FP32                                 ? 4
         : dtype == SIKV_FP16 || dtype == SIKV_BF16         ? 2
         : dtype == SIKV_FP8_E4M3 || dtype == SIKV_FP8_E5M2 ? 1
                                                            : 0;
}

SIKV_INLINE uint32_t sikv_float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

SIKV_INLINE float sikv_bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

/* v >> shift, rounded to nearest, ties to even; 0 < shift < 32. */
SIKV_INLINE uint32_t sikv_shift_round_even(uint32_t v, int shift) {
  const uint32_t down = v >> shift;
  const uint32_t rest = v & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1);
  return down + (rest > half || (rest == half && (down & 1u)));
}

/* A float with `exp_bits` and `man_bits` below its sign, as the bits without the sign; values from
 * 2^emax up come out with an exponent field that the caller judges (overflow). */
SIKV_INLINE uint32_t sikv_narrow_magnitude(uint32_t abs_bits, int exp_bits, int man_bits) {
  const int bias = (1 << (exp_bits - 1)) - 1;
  const int exponent = (int)(abs_bits >> 23) - 127 + bias;
  const int drop = 23 - man_bits;
  if (exponent >= 1) {
    return sikv_shift_round_even((abs_bits & 0x7fffffu) | ((uint32_t)exponent << 23), drop);
  }
  const int shift = drop + 1 - exponent; /* subnormal: the hidden bit becomes explicit */
  return shift >= 32 ? 0u : sikv_shift_round_even((abs_bits & 0x7fffffu) | 0x800000u, shift);
}

SIKV_INLINE float sikv_widen_magnitude(uint32_t magnitude, int exp_bits, int man_bits) {
  const int bias = (1 << (exp_bits - 1)) - 1;
  const uint32_t exponent = magnitude >> man_bits;
  const uint32_t mantissa = magnitude & ((1u << man_bits) - 1u);
  if (exponent == 0) { /* subnormal: mantissa * 2^(1 - bias - man_bits), exact in fp32 */
    return (float)mantissa * sikv_bits_float((uint32_t)(127 + 1 - bias - man_bits) << 23);
  }
  return sikv_bits_float(((exponent + 127u - (uint32_t)bias) << 23) |
                         (mantissa << (23 - man_bits)));
}

SIKV_INLINE uint16_t sikv_float_to_fp16(float x) {
  const uint32_t u = sikv_float_bits(x), a = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  const uint32_t m = a >= 0x47800000u ? 0x7c00u : sikv_narrow_magnitude(a, 5, 10);
  return (uint16_t)(sign | m);
}

SIKV_INLINE float sikv_fp16_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, m = h & 0x7fffu;
  const float a = m >= 0x7c00u ? sikv_bits_float(0x7f800000u | ((m & 0x3ffu) << 13))
                               : sikv_widen_magnitude(m, 5, 10);
  return sikv_bits_float(sign | sikv_float_bits(a));
}

SIKV_INLINE uint16_t sikv_float_to_bf16(float x) {
  const uint32_t u = sikv_float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)sikv_shift_round_even(u, 16);
}

SIKV_INLINE float sikv_bf16_to_float(uint16_t b) { return sikv_bits_float((uint32_t)b << 16); }

SIKV_INLINE uint8_t sikv_float_to_fp8_e4m3(float x) {
  const uint32_t u = sikv_float_bits(x), a = u & 0x7fffffffu, sign = (u >> 24) & 0x80u;
  if (a > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
  if (a >= 0x43e00000u) return (uint8_t)(sign | 0x7eu); /* 448 and above */
  const uint32_t m = sikv_narrow_magnitude(a, 4, 3);
  return (uint8_t)(sign | (m > 0x7eu ? 0x7eu : m));
}

SIKV_INLINE float sikv_fp8_e4m3_to_float(uint8_t b) {
  const uint32_t m = b & 0x7fu, sign = (uint32_t)(b & 0x80u) << 24;
  const float a = m == 0x7fu ? sikv_bits_float(0x7fc00000u) : sikv_widen_magnitude(m, 4, 3);
  return sikv_bits_float(sign | sikv_float_bits(a));
}

SIKV_INLINE uint8_t sikv_float_to_fp8_e5m2(float x) {
  const uint32_t u = sikv_float_bits(x), a = u & 0x7fffffffu, sign = (u >> 24) & 0x80u;
  if (a > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
  if (a >= 0x47600000u) return (uint8_t)(sign | 0x7bu); /* 57344 and above */
  const uint32_t m = sikv_narrow_magnitude(a, 5, 2);
  return (uint8_t)(sign | (m > 0x7bu ? 0x7bu : m));
}

SIKV_INLINE float sikv_fp8_e5m2_to_float(uint8_t b) {
  const uint32_t m = b & 0x7fu, sign = (uint32_t)(b & 0x80u) << 24;
  const float a =
      m >= 0x7cu ? sikv_bits_float(0x7f800000u | ((m & 3u) << 21)) : sikv_widen_magnitude(m, 5, 2);
  return sikv_bits_float(sign | sikv_float_bits(a));
}

/* Element i of an array of `dtype`, as float. */
SIKV_INLINE float sikv_load(const void* data, int32_t dtype, int64_t i) {
  switch (dtype) {
    case SIKV_FP32:
      return ((const float*)data)[i];
    case SIKV_FP16:
      return sikv_fp16_to_float(((const uint16_t*)data)[i]);
    case SIKV_BF16:
      return sikv_bf16_to_float(((const uint16_t*)data)[i]);
    case SIKV_FP8_E4M3:
      return sikv_fp8_e4m3_to_float(((const uint8_t*)data)[i]);
    default:
      return sikv_fp8_e5m2_to_float(((const uint8_t*)data)[i]);
  }
}

/* Rounds x to `dtype` and writes it as element i. */
SIKV_INLINE void sikv_store(void* data, int32_t dtype, int64_t i, float x) {
  switch (dtype) {
    case SIKV_FP32:
      ((float*)data)[i] = x;
      break;
    case SIKV_FP16:
      ((uint16_t*)data)[i] = sikv_float_to_fp16(x);
      break;
    case SIKV_BF16:
      ((uint16_t*)data)[i] = sikv_float_to_bf16(x);
      break;
    case SIKV_FP8_E4M3:
      ((uint8_t*)data)[i] = sikv_float_to_fp8_e4m3(x);
      break;
    default:
      ((uint8_t*)data)[i] = sikv_float_to_fp8_e5m2(x);
      break;
  }
}

#endif
