#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <string>

#include "framework/base/random.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

constexpr int kDim = 64, kKeys = 64;

TestRows gaussian_keys(uint64_t seed, float scale = 1.0f) {
  TestRows rows({kKeys}, 1, kDim, SIKV_FP32);
  Random random(seed);
  for (int t = 0; t < kKeys; ++t) {
    for (int d = 0; d < kDim; ++d)
      rows.set(0, t, 0, d, scale * static_cast<float>(random.normal()));
  }
  return rows;
}

std::vector<float> decoded(const TestRows& rows, int per_channel, int seed) {
  CodecInstance codec =
      make_codec(SIKV_KEY_CODEC, "qjl",
                 {{"rows", std::to_string(per_channel)}, {"seed", std::to_string(seed)}},
                 make_shape(kDim, SIKV_FP32, 1));
  TestCache cache({.num_kv_heads = 1, .head_dim = kDim, .dtype = SIKV_FP32, .encoded = {kKeys}},
                  codec.describe(), sikv_layout{});
  fit_and_encode(codec, rows, cache);
  std::vector<int32_t> slots(kKeys);
  std::iota(slots.begin(), slots.end(), 0);
  return decode_slots(codec, cache, 0, slots);
}

struct Moments {
  double mean, variance, standard_error;
};

// Of (<q, k_hat> - <q, k>) / (||q|| ||k||) over seeds and keys. Queries lean towards the keys, so that
// an estimate that shrinks would show; keys of one seed share a projection, seeds are independent.
Moments errors(int per_channel, int seeds) {
  const TestRows keys = gaussian_keys(1);
  Random random(2);
  std::vector<double> q(size_t{kKeys} * kDim);
  for (int t = 0; t < kKeys; ++t) {
    for (int d = 0; d < kDim; ++d) {
      q[static_cast<size_t>(t * kDim + d)] = keys.at(0, t, 0, d) + random.normal();
    }
  }
  double sum = 0, squares = 0, of_means = 0;
  for (int seed = 0; seed < seeds; ++seed) {
    const std::vector<float> k = decoded(keys, per_channel, seed);
    double of_seed = 0;
    for (int t = 0; t < kKeys; ++t) {
      double error = 0, qq = 0, kk = 0;
      for (int d = 0; d < kDim; ++d) {
        const double x = keys.at(0, t, 0, d), y = q[static_cast<size_t>(t * kDim + d)];
        error += y * (k[static_cast<size_t>(t * kDim + d)] - x);
        qq += y * y, kk += x * x;
      }
      error /= std::sqrt(qq * kk);
      of_seed += error / kKeys;
      squares += error * error;
    }
    sum += of_seed;
    of_means += of_seed * of_seed;
  }
  const double mean = sum / seeds;
  return {mean, squares / (double{kKeys} * seeds) - mean * mean,
          std::sqrt((of_means / seeds - mean * mean) / seeds)};
}

TEST(QjlTest, InnerProductsAreUnbiased) {
  for (const int rows : {2, 4}) {
    const Moments m = errors(rows, 200);
    EXPECT_LT(std::fabs(m.mean), 4 * m.standard_error) << rows;
    EXPECT_LT(m.standard_error, 0.004) << rows;  // the test would see a bias of 2%
  }
}

// Lemma 3.5 of the paper for independent rows: the variance is at most pi / 2 / m, m = rows * D.
TEST(QjlTest, VarianceFallsAsTheNumberOfSigns) {
  double last = 1;
  for (const int rows : {2, 3, 4}) {
    const double variance = errors(rows, 100).variance;
    EXPECT_LT(variance, std::acos(-1.0) / 2 / (rows * kDim)) << rows;
    EXPECT_LT(variance, last);
    last = variance;
  }
}

TEST(QjlTest, EstimatesScaleWithTheNorm) {
  const std::vector<float> once = decoded(gaussian_keys(3), 2, 0),
                           thrice = decoded(gaussian_keys(3, 4.0f), 2, 0);
  for (size_t i = 0; i < once.size(); ++i) EXPECT_NEAR(thrice[i], 4 * once[i], 1e-5f) << i;
}

TEST(QjlTest, BytesPerToken) {
  for (const int rows : {2, 3, 4}) {
    const sikv_layout layout = make_codec(SIKV_KEY_CODEC, "qjl", {{"rows", std::to_string(rows)}},
                                          make_shape(128, SIKV_FP16))
                                   .describe();
    EXPECT_EQ(layout.planes[0].bytes_per_tile, static_cast<uint32_t>(16 * rows));
    EXPECT_EQ(layout.planes[1].bytes_per_tile, 2u);
  }
}

}  // namespace
}  // namespace sikv::testing
