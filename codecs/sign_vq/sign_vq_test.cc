#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "framework/base/error.h"
#include "plugins/layouts/sign4_v1.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

constexpr int kDim = 64;

// Channel 0 of four tokens is 1, 2, 3, -2 and everything else 0: mean 1, so k' = 0, 1, 2, -3.
struct Example {
  explicit Example(const Choices& choices)
      : codec(make_codec(SIKV_KEY_CODEC, "sign_vq", choices, make_shape(kDim, SIKV_FP32, 1))),
        k({4}, 1, kDim, SIKV_FP32),
        cache({.num_kv_heads = 1, .head_dim = kDim, .dtype = SIKV_FP32, .encoded = {4}},
              codec.describe(), {}) {
    k.fill(Pattern::kZeros, 0);
    const float column[] = {1, 2, 3, -2};
    for (int t = 0; t < 4; ++t) k.set(0, t, 0, 0, column[t]);
    fit_and_encode(codec, k, cache);
  }

  const float* table(sikv_table_role role) const { return cache.table(SIKV_KEY_CODEC, role, 0); }
  const uint8_t* plane(sikv_role role) const { return cache.page(SIKV_KEY_CODEC, role, 0, 0); }
  std::vector<float> decode(int32_t slot) const {
    return decode_slots(codec, cache, 0, {&slot, 1});
  }

  CodecInstance codec;
  TestRows k;
  TestCache cache;
};

TEST(SignVqTest, FitsMeanAlphaAndCodebook) {
  const Example example({});
  EXPECT_EQ(example.table(SIKV_KEY_MEAN)[0], 1.0f);
  EXPECT_EQ(example.table(SIKV_KEY_MEAN)[1], 0.0f);
  EXPECT_EQ(example.table(SIKV_KEY_SCALE)[0], 3.0f);
  EXPECT_EQ(example.table(SIKV_KEY_SCALE)[1], 1.0f);  // largest |k'| is 0
  const float* codebook = example.table(SIKV_CODEBOOK);
  EXPECT_EQ(codebook[15 * 4], 1.0f);   // mean of 0, 1, 2
  EXPECT_EQ(codebook[14 * 4], -3.0f);  // the only token below the mean
  EXPECT_EQ(codebook[0 * 4], -1.5f);   // nobody's pattern: sign times mean |k'| = 6 / 4
  EXPECT_EQ(codebook[13 * 4], 1.5f);
  EXPECT_EQ(codebook[13 * 4 + 1], 0.0f);
}

TEST(SignVqTest, PacksSignsMagnitudesAndScales) {
  const Example example({});
  const uint8_t* index = example.plane(SIKV_INDEX_CODE);
  EXPECT_EQ(index[0], 0xff);  // tokens 0 and 1; zeros are positive, -0 too
  EXPECT_EQ(index[1], 0xef);  // token 3: channel 0 negative -> 14, token 2: 15
  EXPECT_EQ(index[2], 0xa5);  // tokens 4 and 5 were not written
  EXPECT_EQ(index[4], 0xff);  // group 1
  const uint8_t* magnitude = example.plane(SIKV_MAGNITUDE) + 16;  // token 1
  EXPECT_EQ(magnitude[0], 0x03);  // channel 0 at the top of its group
  EXPECT_EQ(magnitude[1], 0x00);
  const uint8_t* scale = example.plane(SIKV_SCALE) + 8;
  const float third = 1.0f / 3.0f;  // |k'| / alpha of token 1
  EXPECT_EQ(sikv_load(scale, SIKV_FP16, 0), sikv_fp16_to_float(sikv_float_to_fp16(third / 3)));
  EXPECT_EQ(sikv_load(scale, SIKV_FP16, 1), 0.0f);
  EXPECT_EQ(sikv_load(scale, SIKV_FP16, 2), 0.0f);  // second group: max == min
  EXPECT_FLOAT_EQ(example.decode(1)[0], 3 * sikv_load(scale, SIKV_FP16, 0) * 3.0f + 1.0f);
  EXPECT_EQ(example.decode(3)[0], -(3 * sikv_load(scale + 16, SIKV_FP16, 0)) * 3.0f + 1.0f);
  EXPECT_EQ(example.decode(3)[40], 0.0f);
}

TEST(SignVqTest, SignsAloneComeBackFromTheCodebook) {
  const Example example(Choices{{"magnitude_bits", "0"}});
  EXPECT_EQ(example.codec.describe().num_planes, 1u);
  EXPECT_EQ(example.decode(0)[0], 2.0f);   // 1 + mean
  EXPECT_EQ(example.decode(3)[0], -2.0f);  // -3 + mean
}

TEST(SignVqTest, SixteenBitsKeepKeysAsTheyCame) {
  const Example example(Choices{{"magnitude_bits", "16"}});
  for (int32_t t = 0; t < 4; ++t) EXPECT_EQ(example.decode(t), example.k.row(0, t, 0));
  EXPECT_EQ(example.plane(SIKV_INDEX_CODE)[1], 0xef);
}

TEST(SignVqTest, CentresOnMedianOrNothing) {
  EXPECT_EQ(Example(Choices{{"center", "median"}}).table(SIKV_KEY_MEAN)[0],
            1.0f);  // of -2, 1, 2, 3
  const Example none(Choices{{"center", "none"}});
  EXPECT_EQ(none.table(SIKV_KEY_MEAN)[0], 0.0f);
  EXPECT_EQ(none.table(SIKV_KEY_SCALE)[0], 3.0f);
  EXPECT_EQ(none.table(SIKV_CODEBOOK)[15 * 4], 2.0f);  // mean of 1, 2, 3
}

TEST(SignVqTest, LaterTokensStayFiniteOverASubnormalAlpha) {
  CodecInstance codec = make_codec(SIKV_KEY_CODEC, "sign_vq", {}, make_shape(kDim, SIKV_FP32, 1));
  TestRows prompt({4}, 1, kDim, SIKV_FP32), later({1}, 1, kDim, SIKV_FP32);
  prompt.fill(Pattern::kSubnormal, 1);
  later.fill(Pattern::kHuge, 1);
  TestCache cache({.num_kv_heads = 1, .head_dim = kDim, .dtype = SIKV_FP32, .encoded = {4}},
                  codec.describe(), {});
  fit_and_encode(codec, prompt, cache);
  encode_part(codec, later, cache, 0, {1});
  const int32_t slot = 0;
  for (const float x : decode_slots(codec, cache, 0, {&slot, 1})) EXPECT_TRUE(std::isfinite(x));
}

TEST(SignVqTest, BytesPerTokenAsInThePaper) {
  const auto bytes = [](const Choices& choices) {
    const sikv_layout layout =
        make_codec(SIKV_KEY_CODEC, "sign_vq", choices, make_shape(128, SIKV_FP16)).describe();
    int total = 0;
    for (uint32_t i = 0; i < layout.num_planes; ++i) {
      total += static_cast<int>(layout.planes[i].bytes_per_tile / layout.planes[i].tile_tokens);
    }
    return total;
  };
  EXPECT_EQ(bytes({}), 16 + 32 + 16);
  EXPECT_EQ(bytes({{"scale_type", "fp8_e4m3"}}), 16 + 32 + 8);
  EXPECT_EQ(bytes({{"magnitude_bits", "0"}}), 16);
  EXPECT_EQ(bytes({{"magnitude_bits", "3"}}), 16 + 48 + 16);
  EXPECT_EQ(bytes({{"magnitude_bits", "16"}}), 16 + 256);
}

TEST(SignVqTest, RefusesWithTheReason) {
  const auto refusal = [](const Choices& choices, int head_dim) -> std::string {
    try {
      make_codec(SIKV_KEY_CODEC, "sign_vq", choices, make_shape(head_dim, SIKV_FP16));
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refusal({}, 80).find("head_dim 64, 96, 128 or 256, not 80"), std::string::npos);
  EXPECT_NE(refusal({{"scale_group", "64"}}, 96).find("scale_group 64 does not divide head_dim 96"),
            std::string::npos);
}

TEST(SignVqTest, RefusesWhatIsNotFinite) {
  CodecInstance codec = make_codec(SIKV_KEY_CODEC, "sign_vq", {}, make_shape(kDim, SIKV_FP32));
  TestRows k({3, 5}, 2, kDim, SIKV_FP32);
  TestCache cache({.dtype = SIKV_FP32, .encoded = {3, 5}, .layer = 7}, codec.describe(), {});
  const auto refusal = [&](float x) -> std::string {
    k.fill(Pattern::kGaussian, 1);
    k.set(1, 4, 1, 9, x);
    try {
      fit_and_encode(codec, k, cache);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  const std::string place = "layer 7, head 1, position 4, sequence 1, channel 9";
  EXPECT_NE(refusal(std::numeric_limits<float>::quiet_NaN()).find("K is NaN at " + place),
            std::string::npos);
  EXPECT_NE(refusal(-std::numeric_limits<float>::infinity()).find("K is -inf at " + place),
            std::string::npos);
  EXPECT_NE(refusal(1e30f).find("up to 2^58"), std::string::npos);
  EXPECT_EQ(refusal(1e17f), "");
}

}  // namespace
}  // namespace sikv::testing
