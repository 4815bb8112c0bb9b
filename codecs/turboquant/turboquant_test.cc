#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <string>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "plugins/layouts/turbo_v1.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

// Rows of one head and their decoded form.
struct Coded {
  Coded(sikv_kind kind, const Choices& choices, const TestRows& rows)
      : codec(
            make_codec(kind, "turboquant", choices, make_shape(rows.head_dim(), rows.dtype(), 1))),
        cache({.num_kv_heads = 1,
               .head_dim = rows.head_dim(),
               .dtype = rows.dtype(),
               .encoded = {rows.count(0)}},
              kind == SIKV_KEY_CODEC ? codec.describe() : sikv_layout{},
              kind == SIKV_KEY_CODEC ? sikv_layout{} : codec.describe()) {
    fit_and_encode(codec, rows, cache);
    std::vector<int32_t> slots(static_cast<size_t>(rows.count(0)));
    std::iota(slots.begin(), slots.end(), 0);
    decoded = decode_slots(codec, cache, 0, slots);
  }

  CodecInstance codec;
  TestCache cache;
  std::vector<float> decoded;
};

// Unit vectors of gaussian direction.
TestRows unit_rows(int count, int dim, uint64_t seed) {
  TestRows rows({count}, 1, dim, SIKV_FP32);
  Random random(seed);
  std::vector<double> x(static_cast<size_t>(dim));
  for (int t = 0; t < count; ++t) {
    double squares = 0;
    for (double& value : x) {
      value = random.normal();
      squares += value * value;
    }
    for (int d = 0; d < dim; ++d) {
      rows.set(0, t, 0, d, static_cast<float>(x[static_cast<size_t>(d)] / std::sqrt(squares)));
    }
  }
  return rows;
}

double distortion(const Coded& coded, const TestRows& rows) {
  double error = 0;
  for (int t = 0; t < rows.count(0); ++t) {
    for (int d = 0; d < rows.head_dim(); ++d) {
      const double e =
          coded.decoded[static_cast<size_t>(t * rows.head_dim() + d)] - rows.at(0, t, 0, d);
      error += e * e;
    }
  }
  return error / rows.count(0);
}

TEST(TurboquantTest, DistortionIsThePapers) {
  constexpr double kDistortion[] = {0.3634, 0.1175, 0.0345, 0.0095};
  const TestRows rows = unit_rows(1024, 256, 1);
  for (int bits = 1; bits <= 4; ++bits) {
    for (const sikv_kind kind : {SIKV_KEY_CODEC, SIKV_VALUE_CODEC}) {
      const Coded coded(kind, {{"bits", std::to_string(bits)}}, rows);
      const double expected = kDistortion[bits - 1];
      EXPECT_NEAR(distortion(coded, rows), expected, 0.02 * expected) << bits;
    }
  }
}

// What the levels leave, times pi/2 - 1: the sketch of a residual has orthogonal rows.
TEST(TurboquantTest, DistortionOfTheProductForm) {
  constexpr double kDistortion[] = {0.3634, 0.1175, 0.0345};
  const TestRows rows = unit_rows(1024, 256, 2);
  for (int bits = 2; bits <= 4; ++bits) {
    const Coded coded(SIKV_KEY_CODEC, {{"bits", std::to_string(bits)}, {"form", "prod"}}, rows);
    const double expected = kDistortion[bits - 2] * 0.5708;
    EXPECT_NEAR(distortion(coded, rows), expected, 0.03 * expected) << bits;
  }
}

// The mean over seeds of <q, x_hat> - <q, x>, in standard errors; q = x, so that the shrinking of
// levels shows.
double bias(const Choices& form, int seeds) {
  constexpr int kDim = 64;
  const TestRows rows = unit_rows(8, kDim, 3);
  double sum = 0, squares = 0;
  for (int seed = 0; seed < seeds; ++seed) {
    Choices choices = form;
    choices.emplace_back("seed", std::to_string(seed));
    const Coded coded(SIKV_KEY_CODEC, choices, rows);
    double error = 0;  // q = x: its largest projection
    for (int t = 0; t < 8; ++t) {
      for (int d = 0; d < kDim; ++d) {
        const double x = rows.at(0, t, 0, d);
        error += x * (coded.decoded[static_cast<size_t>(t * kDim + d)] - x);
      }
    }
    sum += error;
    squares += error * error;
  }
  const double mean = sum / seeds;
  const double standard_error = std::sqrt((squares / seeds - mean * mean) / seeds);
  EXPECT_LT(standard_error, 0.02);  // 8 keys at 2 bits would shrink by 0.94 together
  return mean / standard_error;
}

TEST(TurboquantTest, InnerProductsOfTheProductFormAreUnbiased) {
  for (const char* bits : {"2", "3"}) {
    EXPECT_LT(std::fabs(bias({{"form", "prod"}, {"bits", bits}}, 400)), 4.0) << bits;
  }
}

// Lloyd-Max levels are means of their cells: <x, x_hat> = ||x_hat||^2 < ||x||^2.
TEST(TurboquantTest, InnerProductsOfTheMseFormShrink) {
  const TestRows rows = unit_rows(1024, 256, 4);
  const Coded coded(SIKV_KEY_CODEC, {{"bits", "2"}}, rows);
  double dot = 0;
  for (int t = 0; t < 1024; ++t) {
    for (int d = 0; d < 256; ++d) {
      dot += rows.at(0, t, 0, d) * coded.decoded[static_cast<size_t>(t * 256 + d)];
    }
  }
  EXPECT_NEAR(dot / 1024, 1 - 0.1175, 0.005);
}

TEST(TurboquantTest, TheScaleIsTheNorm) {
  TestRows rows({1}, 1, 64, SIKV_FP32);
  for (int d = 0; d < 64; ++d) rows.set(0, 0, 0, d, d == 5 ? 8.0f : 0.0f);
  const Coded coded(SIKV_VALUE_CODEC, {{"bits", "1"}}, rows);
  const uint8_t* scale = coded.cache.page(SIKV_VALUE_CODEC, SIKV_VALUE_SCALE, 0, 0);
  EXPECT_EQ(sikv_load(scale, SIKV_FP16, 0), 1.0f);  // 8 / sqrt(64); all of |y| is 1, too
  EXPECT_NEAR(coded.decoded[5], 8.0f * 0.7979f, 1e-3f);
  EXPECT_NEAR(coded.decoded[6], 0.0f, 1e-6f);
}

TEST(TurboquantTest, BytesPerToken) {
  for (const auto& [choices, code, scale] : {std::tuple<Choices, uint32_t, uint32_t>{{}, 48, 2},
                                             {{{"bits", "1"}}, 16, 2},
                                             {{{"form", "prod"}}, 48, 4}}) {
    const sikv_layout layout =
        make_codec(SIKV_KEY_CODEC, "turboquant", choices, make_shape(128, SIKV_FP16)).describe();
    EXPECT_EQ(layout.planes[0].bytes_per_tile, code);
    EXPECT_EQ(layout.planes[1].bytes_per_tile, scale);
  }
}

TEST(TurboquantTest, OneBitLeavesNoneForTheSketch) {
  try {
    make_codec(SIKV_KEY_CODEC, "turboquant", {{"form", "prod"}, {"bits", "1"}},
               make_shape(64, SIKV_FP16));
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("use 2 bits or more"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace sikv::testing
