#include <gtest/gtest.h>

#include "plugins/layouts/intq_v1.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

constexpr int kDim = 64;

struct Example {
  // One token: `group` in the first channels, its last number up to channel 31, 5 from there on.
  Example(const std::vector<float>& group, const Choices& choices)
      : codec(make_codec(SIKV_VALUE_CODEC, "intq", choices, make_shape(kDim, SIKV_FP32, 1))),
        v({1}, 1, kDim, SIKV_FP32),
        cache({.num_kv_heads = 1, .head_dim = kDim, .dtype = SIKV_FP32, .encoded = {1}}, {},
              codec.describe()) {
    for (int d = 0; d < kDim; ++d) {
      const size_t i = std::min(static_cast<size_t>(d), group.size() - 1);
      v.set(0, 0, 0, d, d < 32 ? group[i] : 5.0f);
    }
    fit_and_encode(codec, v, cache);
  }

  const uint8_t* codes() const { return cache.page(SIKV_VALUE_CODEC, SIKV_VALUE_CODE, 0, 0); }
  float scale(int i, int32_t dtype) const {
    return sikv_load(cache.page(SIKV_VALUE_CODEC, SIKV_VALUE_SCALE, 0, 0), dtype, i);
  }
  std::vector<float> decode() const {
    const int32_t slot = 0;
    return decode_slots(codec, cache, 0, {&slot, 1});
  }

  CodecInstance codec;
  TestRows v;
  TestCache cache;
};

TEST(IntqTest, QuantisesAGroup) {
  const Example example({0, 1, 2, 3}, {});
  EXPECT_EQ(example.codes()[0], 0xe4);  // 3 2 1 0
  EXPECT_EQ(example.codes()[1], 0xff);
  EXPECT_EQ(example.codes()[8], 0x00);        // second group: max == min
  EXPECT_EQ(example.scale(0, SIKV_FP16), 1);  // (3 - 0) / 3
  EXPECT_EQ(example.scale(1, SIKV_FP16), 0);  // min
  EXPECT_EQ(example.scale(2, SIKV_FP16), 0);
  EXPECT_EQ(example.scale(3, SIKV_FP16), 5);
  EXPECT_EQ(example.decode(), example.v.row(0, 0, 0));
}

TEST(IntqTest, TiesGoToEven) {
  const Example example({0.5f, 1.5f, 2.5f, 0, 3}, {});
  EXPECT_EQ(example.codes()[0], 0 | 2 << 2 | 2 << 4 | 0 << 6);
}

TEST(IntqTest, CodesAreMadeAgainstTheStoredScale) {
  // scale 0.3 and zero -0.3 are both stored as 0.3125; 0.15 / 0.3125 + 1 = 1.48 rounds to 1,
  // against the exact scale 1.5 would have gone to 2.
  const Example example({-0.3f, 0.6f, 0.15f}, {{"scale_type", "fp8_e4m3"}});
  EXPECT_EQ(example.scale(0, SIKV_FP8_E4M3), 0.3125f);
  EXPECT_EQ(example.scale(1, SIKV_FP8_E4M3), -0.3125f);
  EXPECT_EQ(example.codes()[0], 0 | 3 << 2 | 1 << 4 | 1 << 6);
  EXPECT_EQ(example.decode()[1], 3 * 0.3125f - 0.3125f);
}

TEST(IntqTest, ScalesSaturate) {
  const Example example({-1e6f, 1e6f}, {});
  EXPECT_EQ(example.scale(0, SIKV_FP16), 65504.0f);
  EXPECT_EQ(example.scale(1, SIKV_FP16), -65504.0f);
  EXPECT_EQ(example.decode()[0], -65504.0f);
  EXPECT_EQ(example.decode()[1], 2 * 65504.0f);
}

TEST(IntqTest, SixteenBitsKeepValuesAsTheyCame) {
  const Example example({0.1f, -7.3f, 1e-30f}, {{"bits", "16"}});
  EXPECT_EQ(example.codec.describe().num_planes, 1u);
  EXPECT_EQ(example.decode(), example.v.row(0, 0, 0));
}

TEST(IntqTest, WiderCodesShrinkTheStep) {
  EXPECT_EQ(Example({0, 15}, {{"bits", "4"}}).scale(0, SIKV_FP16), 1.0f);
  EXPECT_EQ(Example({0, 255}, {{"bits", "8"}}).scale(0, SIKV_FP16), 1.0f);
}

}  // namespace
}  // namespace sikv::testing
