#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "framework/base/random.h"
#include "kernels/common/lloyd_levels.h"
#include "plugins/layouts/polar_v1.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

constexpr double kPi = std::numbers::pi;

double angle(const polar::Direction& to) { return std::atan2(to.sin, to.cos); }

// ---- the codebooks ------------------------------------------------------------------------------

TEST(PolarAnglesTest, SectorsAreSixteenEqualOnes) {
  for (uint32_t code = 0; code < 16; ++code) {
    const polar::Direction middle = polar::sector_direction(code);
    EXPECT_NEAR(middle.cos, std::cos((code + 0.5) * kPi / 8), 1e-7) << code;
    EXPECT_NEAR(middle.sin, std::sin((code + 0.5) * kPi / 8), 1e-7) << code;
    for (const double within : {0.001, 0.3, 0.5, 0.999}) {
      const double at = (code + within) * kPi / 8;
      EXPECT_EQ(
          polar::sector_of(static_cast<float>(std::cos(at)), static_cast<float>(std::sin(at))),
          code);
    }
  }
}

// Of the density sin(2 psi)^(2^(l-1) - 1) on [0, pi/2].
TEST(PolarAnglesTest, AnglesAreTheLloydMaxLevelsOfTheirDensity) {
  for (int level = 2; level <= polar::kLevels; ++level) {
    constexpr int kCells = 1 << 16;
    LevelCells cells(0.0, kPi / 2, kCells);
    for (int i = 0; i < kCells; ++i) {
      const double psi = (i + 0.5) * kPi / 2 / kCells;
      cells.add(psi, std::pow(std::sin(2 * psi), (1 << (level - 1)) - 1));
    }
    const std::vector<double> levels = cells.levels(4, 10000);
    for (uint32_t code = 0; code < 4; ++code) {
      const polar::Direction to = polar::angle_direction(level, code);
      EXPECT_NEAR(angle(to), levels[code], 1e-4) << level << " " << code;
      EXPECT_NEAR(to.cos * to.cos + to.sin * to.sin, 1.0, 1e-6);
    }
    EXPECT_NEAR(std::atan(polar::border_tangent(level)), (levels[0] + levels[1]) / 2, 1e-4);
  }
}

// The density itself: how often rows of normal numbers get each code.
TEST(PolarAnglesTest, TheDensityIsThatOfNormalRows) {
  Random random(1);
  for (int level = 2; level <= polar::kLevels; ++level) {
    const int half = 1 << (level - 1);  // channels behind each radius
    constexpr int kDraws = 20000;
    double share[4] = {}, expected[4] = {}, weight = 0;
    for (int i = 0; i < kDraws; ++i) {
      double first = 0, second = 0;
      for (int d = 0; d < half; ++d) {
        first += std::pow(random.normal(), 2);
        second += std::pow(random.normal(), 2);
      }
      share[polar::angle_of(level, static_cast<float>(std::sqrt(first)),
                            static_cast<float>(std::sqrt(second)))] += 1.0 / kDraws;
    }
    const double border = std::atan(polar::border_tangent(level));
    for (double psi = 0.0005; psi < kPi / 2; psi += 0.001) {
      const double density = std::pow(std::sin(2 * psi), half - 1);
      const int code = (psi > border) + (psi > kPi / 4) + (psi > kPi / 2 - border);
      expected[code] += density;
      weight += density;
    }
    for (int code = 0; code < 4; ++code) {
      EXPECT_NEAR(share[code], expected[code] / weight, 0.015) << level << " " << code;
    }
  }
}

TEST(PolarAnglesTest, NothingHappensWhereTheCircleCloses) {
  constexpr float kTiny = 1e-30f;  // 2 pi - 1e-30 is 2 pi, in any float
  EXPECT_EQ(polar::sector_of(1.0f, kTiny), 0u);
  EXPECT_EQ(polar::sector_of(1.0f, 0.0f), 0u);
  EXPECT_EQ(polar::sector_of(1.0f, -0.0f), 0u);
  EXPECT_EQ(polar::sector_of(1.0f, -kTiny), 15u);
  for (const float y : {kTiny, 0.0f, -0.0f, -kTiny}) {
    const polar::Direction to = polar::sector_direction(polar::sector_of(1.0f, y));
    EXPECT_NEAR(std::fabs(angle(to)), kPi / 16, 1e-6);
  }
  EXPECT_EQ(polar::sector_of(-1.0f, kTiny), 7u);
  EXPECT_EQ(polar::sector_of(-1.0f, -0.0f), 8u);
  EXPECT_EQ(polar::sector_of(0.0f, 1.0f), 4u);
  EXPECT_EQ(polar::sector_of(-0.0f, 1.0f), 4u);
  EXPECT_EQ(polar::sector_of(0.0f, -1.0f), 12u);
  EXPECT_EQ(polar::sector_of(0.0f, 0.0f), 0u);
  EXPECT_EQ(polar::sector_of(-0.0f, -0.0f), 0u);
}

// ---- the transform ------------------------------------------------------------------------------

// In fp64, with angles: what the layout computes without any.
struct Polar {
  explicit Polar(std::vector<double> y) {
    for (int level = 1; level <= polar::kLevels; ++level) {
      std::vector<double> radii;
      for (size_t i = 0; i < y.size(); i += 2) {
        double psi = std::atan2(y[i + 1], y[i]);
        if (psi < 0) psi += 2 * kPi;
        angles[level].push_back(psi);
        radii.push_back(std::hypot(y[i], y[i + 1]));
      }
      y = radii;
    }
    radii = y;
  }
  std::vector<double> inverse() const {
    std::vector<double> y = radii;
    for (int level = polar::kLevels; level >= 1; --level) {
      std::vector<double> pairs;
      for (size_t i = 0; i < y.size(); ++i) {
        pairs.push_back(y[i] * std::cos(angles[level][i]));
        pairs.push_back(y[i] * std::sin(angles[level][i]));
      }
      y = pairs;
    }
    return y;
  }

  std::vector<double> angles[polar::kLevels + 1];
  std::vector<double> radii;
};

struct Token {
  explicit Token(int head_dim) : p{head_dim} {}
  polar::Page page() { return {code.data(), scale.data()}; }
  uint32_t code_at(int level, int i) const {
    return level == 1 ? bitpack::get(code.data(), polar::kSectorBits, i)
                      : bitpack::get(code.data() + polar::sector_bytes(p), polar::kAngleBits,
                                     polar::first_code(p, level) + i);
  }
  std::vector<float> there_and_back(std::vector<float> y) {
    polar::pack_rotated_1(p, page(), 0, y.data());
    polar::unpack_rotated_1(p, page(), 0, y.data());
    return y;
  }

  polar::Params p;
  std::vector<uint8_t> code = std::vector<uint8_t>(128), scale = std::vector<uint8_t>(64);
};

std::vector<float> normal_row(Random& random, int head_dim) {
  std::vector<float> y(static_cast<size_t>(head_dim));
  for (float& number : y) number = static_cast<float>(random.normal());
  return y;
}

// Codes are the nearest levels to the angles of a transform that, without quantisation, inverts.
TEST(PolarTransformTest, CodesAreThoseOfTheAngles) {
  Random random(3);
  for (const int head_dim : {64, 96, 128, 256}) {
    Token token(head_dim);
    for (int draw = 0; draw < 50; ++draw) {
      const std::vector<float> y = normal_row(random, head_dim);
      const Polar exact({y.begin(), y.end()});
      const std::vector<double> inverse = exact.inverse();
      for (size_t d = 0; d < y.size(); ++d) ASSERT_NEAR(inverse[d], y[d], 1e-13);

      token.there_and_back(y);
      for (int i = 0; i < head_dim / 2; ++i) {
        const double sector = exact.angles[1][static_cast<size_t>(i)] / (kPi / 8);
        if (std::fabs(sector - std::round(sector)) < 1e-5) continue;  // a border
        ASSERT_EQ(token.code_at(1, i), static_cast<uint32_t>(sector));
      }
      for (int level = 2; level <= polar::kLevels; ++level) {
        for (int i = 0; i < head_dim >> level; ++i) {
          const double psi = exact.angles[level][static_cast<size_t>(i)];
          double nearest = HUGE_VAL;
          for (uint32_t code = 0; code < 4; ++code) {
            nearest =
                std::min(nearest, std::fabs(psi - angle(polar::angle_direction(level, code))));
          }
          ASSERT_NEAR(
              std::fabs(psi - angle(polar::angle_direction(level, token.code_at(level, i)))),
              nearest, 1e-6);
        }
      }
    }
  }
}

// What decodes from some codes encodes to the same ones, and decodes to the same numbers again.
TEST(PolarTransformTest, QuantisedRowsComeBack) {
  Random random(5);
  for (const int head_dim : {64, 96, 128, 256}) {
    Token token(head_dim);
    for (int draw = 0; draw < 50; ++draw) {
      const std::vector<float> once = token.there_and_back(normal_row(random, head_dim));
      const std::vector<uint8_t> code = token.code, scale = token.scale;
      EXPECT_EQ(token.there_and_back(once), once);
      EXPECT_EQ(token.code, code);
      EXPECT_EQ(token.scale, scale);
    }
  }
}

TEST(PolarTransformTest, BlocksKeepTheirNormUpToFp16) {
  Random random(7);
  Token token(128);
  for (int draw = 0; draw < 50; ++draw) {
    std::vector<float> y = normal_row(random, 128);
    for (int d = 0; d < 128; ++d) y[static_cast<size_t>(d)] *= std::pow(2.0f, d / 16 - 4);
    const std::vector<float> decoded = token.there_and_back(y);
    for (size_t first = 0; first < 128; first += polar::kBlock) {
      double before = 0, after = 0;
      for (size_t d = first; d < first + polar::kBlock; ++d) {
        before += double{y[d]} * y[d];
        after += double{decoded[d]} * decoded[d];
      }
      EXPECT_NEAR(std::sqrt(after), std::sqrt(before), 0x1.01p-11 * std::sqrt(before));
    }
  }
}

TEST(PolarTransformTest, ZerosAreExact) {
  Token token(96);
  for (const float number : token.there_and_back(std::vector<float>(96, -0.0f))) {
    EXPECT_EQ(number, 0.0f);
  }
}

// ---- the codec ----------------------------------------------------------------------------------

// Relative squared error of unit normal rows.
double distortion(int head_dim) {
  CodecInstance codec =
      make_codec(SIKV_KEY_CODEC, "polarquant", {}, make_shape(head_dim, SIKV_FP32, 1));
  TestRows rows({512}, 1, head_dim, SIKV_FP32);
  rows.fill(Pattern::kGaussian, 9);
  TestCache cache({.num_kv_heads = 1, .head_dim = head_dim, .dtype = SIKV_FP32, .encoded = {512}},
                  codec.describe(), {});
  fit_and_encode(codec, rows, cache);
  double error = 0, norm = 0;
  for (int32_t t = 0; t < 512; ++t) {
    const std::vector<float> decoded = decode_slots(codec, cache, 0, {&t, 1});
    for (int d = 0; d < head_dim; ++d) {
      error += std::pow(decoded[static_cast<size_t>(d)] - rows.at(0, t, 0, d), 2);
      norm += std::pow(rows.at(0, t, 0, d), 2);
    }
  }
  return error / norm;
}

// Radii are exact here, and every level holds the whole norm: turning all pairs of a level by some
// angles moves a block by the norm times their root mean square. So levels add up, to first order.
TEST(PolarquantTest, DistortionIsTheSumOfTheAngles) {
  double expected = std::pow(kPi / 8, 2) / 12;
  for (int level = 2; level <= polar::kLevels; ++level) {
    double weight = 0, error = 0;
    for (double psi = 0.00005; psi < kPi / 2; psi += 0.0001) {
      const double density = std::pow(std::sin(2 * psi), (1 << (level - 1)) - 1);
      const uint32_t code = polar::angle_of(level, static_cast<float>(std::cos(psi)),
                                            static_cast<float>(std::sin(psi)));
      weight += density;
      error += density * std::pow(psi - angle(polar::angle_direction(level, code)), 2);
    }
    expected += error / weight;
  }
  EXPECT_NEAR(expected, 0.0323, 0.0001);
  for (const int head_dim : {64, 96, 128, 256}) {
    EXPECT_NEAR(distortion(head_dim), expected, 0.03 * expected) << head_dim;
  }
}

TEST(PolarquantTest, BytesOfATokenByHand) {
  CodecInstance codec =
      make_codec(SIKV_VALUE_CODEC, "polarquant", {}, make_shape(64, SIKV_FP32, 1));
  // Rotated: the second block is (0, -3, 0, 4, 0 ...), all others 0.
  std::vector<float> y(64);
  y[17] = -3.0f;
  y[19] = 4.0f;
  rotation::inverse(y.data(), 64);
  TestRows rows({1}, 1, 64, SIKV_FP32);
  for (int d = 0; d < 64; ++d) rows.set(0, 0, 0, d, y[static_cast<size_t>(d)]);
  TestCache cache({.num_kv_heads = 1, .dtype = SIKV_FP32, .encoded = {1}}, {}, codec.describe());
  fit_and_encode(codec, rows, cache);
  const uint8_t* code = cache.page(SIKV_VALUE_CODEC, SIKV_VALUE_CODE, 0, 0);
  EXPECT_EQ(code[8 / 2], 0x4c);  // pairs 8 and 9 point down and up: sectors 12 and 4
  // Level 2, code 4: radii 3 and 4, an angle of 0.927 between the borders 0.785 and 1.099.
  EXPECT_EQ(code[16 + 1], 0x02);
  const uint8_t* scale = cache.page(SIKV_VALUE_CODEC, SIKV_VALUE_SCALE, 0, 0);
  EXPECT_EQ(sikv_load(scale, SIKV_FP16, 1), 5.0f);
  EXPECT_EQ(sikv_load(scale, SIKV_FP16, 2), 0.0f);
}

TEST(PolarquantTest, BytesPerToken) {
  const auto bytes = [](sikv_kind kind, int head_dim) {
    const sikv_layout layout =
        make_codec(kind, "polarquant", {}, make_shape(head_dim, SIKV_FP16)).describe();
    return layout.planes[0].bytes_per_tile + layout.planes[1].bytes_per_tile;
  };
  for (const sikv_kind kind : {SIKV_KEY_CODEC, SIKV_VALUE_CODEC}) {
    EXPECT_EQ(bytes(kind, 64), 31u);
    EXPECT_EQ(bytes(kind, 96), 47u);  // 46.5
    EXPECT_EQ(bytes(kind, 128), 62u);
    EXPECT_EQ(bytes(kind, 256), 124u);
  }
}

}  // namespace
}  // namespace sikv::testing
