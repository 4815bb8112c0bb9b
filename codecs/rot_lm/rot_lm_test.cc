#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <tuple>

#include "framework/base/error.h"
#include "plugins/layouts/paged_sum.h"
#include "plugins/layouts/rlm4_v1.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

TEST(RotationTest, SignsComeFromSplitmix64) {
  EXPECT_EQ(rotation::splitmix64(0), 0xe220a8397b1dcdafu);  // the generator's published first word
  EXPECT_EQ(rotation::splitmix64(1), 0x910a2dec89025cc1u);
  EXPECT_EQ(rotation::sign(0), 1.0f);
  EXPECT_EQ(rotation::sign(2), (rotation::splitmix64(2) & 1) != 0 ? 1.0f : -1.0f);
}

TEST(RotationTest, BlocksAreThePowersOfTwoInD) {
  EXPECT_EQ(rotation::block(64), 64);
  EXPECT_EQ(rotation::block(96), 32);
  EXPECT_EQ(rotation::block(128), 128);
  EXPECT_EQ(rotation::block(256), 256);
}

// Column j of R is s_j times a column of the Hadamard matrix: (-1)^popcount(i & j) / sqrt(b).
TEST(RotationTest, IsHadamardTimesSigns) {
  for (const int head_dim : {64, 96, 128, 256}) {
    const int b = rotation::block(head_dim);
    for (int j = 0; j < head_dim; ++j) {
      std::vector<float> x(static_cast<size_t>(head_dim));
      x[static_cast<size_t>(j)] = 1.0f;
      rotation::forward(x.data(), head_dim);
      for (int i = 0; i < head_dim; ++i) {
        const bool odd = __builtin_popcount(static_cast<unsigned>(i % b & j % b)) % 2 != 0;
        const double expected =
            i / b != j / b ? 0.0 : rotation::sign(j) * (odd ? -1.0 : 1.0) / std::sqrt(double(b));
        ASSERT_EQ(x[static_cast<size_t>(i)], static_cast<float>(expected)) << i << " " << j;
      }
      rotation::inverse(x.data(), head_dim);
      EXPECT_NEAR(x[static_cast<size_t>(j)], 1.0f, 1e-6f);
    }
  }
}

TEST(RotLmQuantiserTest, BoundariesAreTheMidpointsOfTheLevels) {
  for (const int bits : {2, 3, 4}) {
    for (int i = 0; i + 1 < rlm4::num_levels(bits); ++i) {
      const float middle = (rlm4::level_value(bits, i) + rlm4::level_value(bits, i + 1)) / 2;
      EXPECT_NEAR(rlm4::level_boundary(bits, i), middle, 1e-4f);
    }
  }
}

TEST(RotLmQuantiserTest, LevelsOfAFlatRow) {
  // |y| / r = 1 everywhere: one boundary of three (0.5006 < 1 < 1.05) lies below.
  const rlm4::Params p{64, 3};
  std::vector<float> y(64, -2.0f);
  uint8_t levels[64];
  EXPECT_NEAR(rlm4::quantise(p, y.data(), levels), 2.0f / 0.7560f, 1e-5f);
  for (const uint8_t level : levels) EXPECT_EQ(level, 1);
}

TEST(RotLmQuantiserTest, LevelsOfOneSpike) {
  // sum y^2 = 64 + 63 * 0 -> r = 1: the spike is at ratio 8 (top level), the rest at 0.
  const rlm4::Params p{64, 2};
  std::vector<float> y(64, 0.0f);
  y[5] = 8.0f;
  uint8_t levels[64];
  const double dot = 8.0 * 1.5104, square = 1.5104 * 1.5104 + 63 * 0.4528 * 0.4528;
  EXPECT_NEAR(rlm4::quantise(p, y.data(), levels), dot / square, 1e-5);
  EXPECT_EQ(levels[5], 1);
  EXPECT_EQ(levels[6], 0);
}

TEST(RotLmQuantiserTest, ZerosGiveScaleZero) {
  std::vector<float> y(64, -0.0f);
  uint8_t levels[64];
  EXPECT_EQ(rlm4::quantise({64, 4}, y.data(), levels), 0.0f);
  EXPECT_EQ(levels[0], 0);
}

// One token: its mean is itself, so it comes back exactly and every code says "zero, positive".
TEST(RotLmTest, OneTokenIsItsMean) {
  CodecInstance key = make_codec(SIKV_KEY_CODEC, "rot_lm", {}, make_shape(64, SIKV_FP16));
  CodecInstance value = make_codec(SIKV_VALUE_CODEC, "rot_lm", {}, make_shape(64, SIKV_FP16));
  const FilledCache filled({.encoded = {1}}, std::move(key), std::move(value));
  const TestCache& cache = filled.cache;
  EXPECT_EQ(cache.page(SIKV_KEY_CODEC, SIKV_INDEX_CODE, 0, 0)[0], 0xaf);    // token 0; 1 as it was
  EXPECT_EQ(cache.page(SIKV_VALUE_CODEC, SIKV_VALUE_CODE, 0, 0)[0], 0xaa);  // sign 1, level 0
  const int32_t slot = 0;
  EXPECT_EQ(decode_slots(filled.key, cache, 0, {&slot, 1}), filled.k.row(0, 0, 0));
  EXPECT_EQ(decode_slots(filled.value, cache, 1, {&slot, 1}), filled.v.row(0, 0, 1));
}

// Two tokens m + e and m - e with e a column of R^T: y = (+-8, 0, 0, ...) / 8 * |e|.
TEST(RotLmTest, CodebookHoldsRotatedVectors) {
  CodecInstance key = make_codec(SIKV_KEY_CODEC, "rot_lm", {}, make_shape(64, SIKV_FP32, 1));
  std::vector<float> e(64);
  e[0] = 8.0f;
  rotation::inverse(e.data(), 64);
  TestRows k({2}, 1, 64, SIKV_FP32);
  for (int d = 0; d < 64; ++d) {
    k.set(0, 0, 0, d, 3.0f + e[static_cast<size_t>(d)]);
    k.set(0, 1, 0, d, 3.0f - e[static_cast<size_t>(d)]);
  }
  TestCache cache({.num_kv_heads = 1, .dtype = SIKV_FP32, .encoded = {2}}, key.describe(), {});
  fit_and_encode(key, k, cache);
  EXPECT_EQ(cache.table(SIKV_KEY_CODEC, SIKV_KEY_MEAN, 0)[17], 3.0f);
  const float* codebook = cache.table(SIKV_KEY_CODEC, SIKV_CODEBOOK, 0);
  EXPECT_EQ(codebook[15 * 4], 8.0f);
  EXPECT_EQ(codebook[14 * 4], -8.0f);
  EXPECT_EQ(codebook[0], -8.0f);  // nobody's pattern: minus mean |y|
  EXPECT_EQ(codebook[(1 * 16 + 15) * 4], 0.0f);
  EXPECT_EQ(cache.page(SIKV_KEY_CODEC, SIKV_INDEX_CODE, 0, 0)[0], 0xef);
  EXPECT_EQ(cache.page(SIKV_KEY_CODEC, SIKV_MAGNITUDE, 0, 0)[0], 0x03);  // ratio 8: top level
}

TEST(FitSampleTest, EntriesAreEvenlySpacedFromTheFirst) {
  const FitSample third(9, 3), some(10, 4);
  EXPECT_EQ(third.size, 3);
  EXPECT_EQ(third.position(0), 0);
  EXPECT_EQ(third.position(1), 3);
  EXPECT_EQ(third.position(2), 6);
  EXPECT_EQ(some.position(1), 2);
  EXPECT_EQ(some.position(2), 5);
  EXPECT_EQ(some.position(3), 7);
  EXPECT_EQ(FitSample(1 << 20, 1 << 19).position((1 << 19) - 1), (1 << 20) - 2);
}

TEST(FitSampleTest, ShortPromptsAndZeroTakeEveryToken) {
  for (const int fit_tokens : {0, 9, 10}) {
    const FitSample sample(9, fit_tokens);
    EXPECT_TRUE(sample.all());
    EXPECT_EQ(sample.position(8), 8);
  }
}

// Tables from a sample of a prompt are those of a prompt that is the sample.
class FitTokensTest : public ::testing::TestWithParam<std::tuple<sikv_kind, const char*, int>> {};

TEST_P(FitTokensTest, FitsOnTheSampleAlone) {
  const auto [kind, id, fit_tokens] = GetParam();
  constexpr int kPrompt = 1000;
  const FitSample sample(kPrompt, fit_tokens);
  for (const Variant& variant : registry().variants()) {
    if (variant.kind != kind || variant.id != id || variant.device != SIKV_CPU) continue;
    for (const int head_dim : {64, 96}) {
      const sikv_shape shape = make_shape(head_dim, SIKV_BF16);
      const Choices choices{{"fit_tokens", std::to_string(fit_tokens)}};
      CodecInstance sampling = make_codec(kind, id, choices, shape, cpu(), variant.variant);
      CodecInstance whole = make_codec(kind, id, {}, shape);
      TestRows rows({kPrompt}, 2, head_dim, SIKV_BF16);
      rows.fill(Pattern::kOffset, 5);
      TestRows sampled({sample.size}, 2, head_dim, SIKV_BF16);
      for (int i = 0; i < sample.size; ++i) {
        for (int h = 0; h < 2; ++h) {
          for (int d = 0; d < head_dim; ++d) {
            sampled.set(0, i, h, d, rows.at(0, sample.position(i), h, d));
          }
        }
      }
      const bool keys = kind == SIKV_KEY_CODEC;
      const sikv_layout layout = whole.describe(), nothing{};
      const auto cache_of = [&] {
        return std::make_unique<TestCache>(
            CacheSpec{.head_dim = head_dim, .dtype = SIKV_BF16, .encoded = {kPrompt}},
            keys ? layout : nothing, keys ? nothing : layout);
      };
      const auto a = cache_of(), b = cache_of();
      fit_part(sampling, rows.all(), *a);
      fit_part(whole, sampled.all(), *b);
      for (int row = 0; row < 2; ++row) {
        EXPECT_EQ(a->row_bytes(kind, row), b->row_bytes(kind, row)) << variant.variant;
      }
    }
  }
}

TEST_P(FitTokensTest, ChecksTheNewestTokensToo) {
  const auto [kind, id, fit_tokens] = GetParam();
  for (const Variant& variant : registry().variants()) {
    if (variant.kind != kind || variant.id != id || variant.device != SIKV_CPU) continue;
    const Choices choices{{"fit_tokens", std::to_string(fit_tokens)}};
    CodecInstance codec =
        make_codec(kind, id, choices, make_shape(64, SIKV_FP16), cpu(), variant.variant);
    TestRows rows({1000}, 2, 64, SIKV_FP16);
    rows.fill(Pattern::kGaussian, 1);
    rows.set(0, 999, 1, 3, std::nanf(""));
    const bool keys = kind == SIKV_KEY_CODEC;
    const TestCache cache({.encoded = {1000}}, keys ? codec.describe() : sikv_layout{},
                          keys ? sikv_layout{} : codec.describe());
    try {
      fit_part(codec, rows.all(), cache);
      ADD_FAILURE() << variant.variant << " took a NaN";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("head 1, position 999"), std::string::npos)
          << error.what();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Codecs, FitTokensTest,
                         ::testing::Combine(::testing::Values(SIKV_KEY_CODEC),
                                            ::testing::Values("rot_lm", "sign_vq"),
                                            ::testing::Values(1, 300, 512)));
INSTANTIATE_TEST_SUITE_P(ValueCodecs, FitTokensTest,
                         ::testing::Combine(::testing::Values(SIKV_VALUE_CODEC),
                                            ::testing::Values("rot_lm"),
                                            ::testing::Values(1, 300, 512)));

}  // namespace
}  // namespace sikv::testing
