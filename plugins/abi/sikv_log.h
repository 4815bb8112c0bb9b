/* log x in the same bits on both sides of the boundary: random numbers of the framework and the
 * directions whose signs plugins store are made of it. IEEE 754 fixes + - * /, which it takes in one
 * order; the tree is built with -ffp-contract=off, so that none is fused with another. */
#ifndef SIKV_PLUGINS_ABI_SIKV_LOG_H_
#define SIKV_PLUGINS_ABI_SIKV_LOG_H_

#include <stdint.h>
#include <string.h>

/* Natural logarithm of a positive, finite, normal number; relative error below 1e-15 away from 1.
 * With x = m 2^e and m in [sqrt(1/2), sqrt(2)), log m = 2 atanh s, s = (m - 1) / (m + 1); |s| < 0.172,
 * and the series to s^21 leaves less than 1e-17. */
static inline double sikv_log(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  int exponent = (int)(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
  double m;
  memcpy(&m, &bits, sizeof m);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double s = (m - 1) / (m + 1), s2 = s * s;
  double series = 0;
  for (int k = 21; k >= 3; k -= 2) series = (series + 1.0 / k) * s2;
  return exponent * 0.69314718055994530942 + 2 * (s + s * series);
}

#endif /* SIKV_PLUGINS_ABI_SIKV_LOG_H_ */
