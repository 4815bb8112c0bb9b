#include <gtest/gtest.h>

#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

constexpr int kDim = 64;

TEST(KiviTest, KeysShareScalesAlongTokens) {
  CodecInstance codec = make_codec(SIKV_KEY_CODEC, "kivi", {}, make_shape(kDim, SIKV_FP32, 1));
  TestRows k({64}, 1, kDim, SIKV_FP32);
  for (int t = 0; t < 64; ++t) {
    for (int d = 0; d < kDim; ++d) {
      k.set(0, t, 0, d, t < 32 ? static_cast<float>(t % 4 + d) : 9.0f);
    }
  }
  TestCache cache({.num_kv_heads = 1, .dtype = SIKV_FP32, .encoded = {64}}, codec.describe(), {});
  fit_and_encode(codec, k, cache);
  const uint8_t* codes = cache.page(SIKV_KEY_CODEC, SIKV_MAGNITUDE, 0, 0);
  EXPECT_EQ(codes[0 * 16], 0x00);  // token 0: code 0 in every channel
  EXPECT_EQ(codes[1 * 16], 0x55);
  EXPECT_EQ(codes[3 * 16], 0xff);
  EXPECT_EQ(codes[32 * 16], 0x00);  // a constant group
  const uint8_t* scales = cache.page(SIKV_KEY_CODEC, SIKV_SCALE, 0, 0);
  EXPECT_EQ(sikv_load(scales, SIKV_FP16, 2 * 5), 1.0f);      // channel 5: (8 - 5) / 3
  EXPECT_EQ(sikv_load(scales, SIKV_FP16, 2 * 5 + 1), 5.0f);  // its minimum
  EXPECT_EQ(sikv_load(scales + 4 * kDim, SIKV_FP16, 0), 0.0f);
  EXPECT_EQ(sikv_load(scales + 4 * kDim, SIKV_FP16, 1), 9.0f);
  for (const int32_t slot : {0, 3, 31, 32, 63}) {
    EXPECT_EQ(decode_slots(codec, cache, 0, {&slot, 1}), k.row(0, slot, 0));
  }
}

TEST(KiviTest, ValuesShareScalesAlongChannels) {
  CodecInstance codec = make_codec(SIKV_VALUE_CODEC, "kivi", {}, make_shape(kDim, SIKV_FP32, 1));
  TestRows v({1}, 1, kDim, SIKV_FP32);
  for (int d = 0; d < kDim; ++d) v.set(0, 0, 0, d, static_cast<float>(d % 4));
  TestCache cache({.num_kv_heads = 1, .dtype = SIKV_FP32, .encoded = {1}}, {}, codec.describe());
  fit_and_encode(codec, v, cache);
  EXPECT_EQ(cache.page(SIKV_VALUE_CODEC, SIKV_VALUE_CODE, 0, 0)[0], 0xe4);
  EXPECT_EQ(sikv_load(cache.page(SIKV_VALUE_CODEC, SIKV_VALUE_SCALE, 0, 0), SIKV_FP16, 0), 1.0f);
}

TEST(KiviTest, BytesPerToken) {
  const sikv_layout layout =
      make_codec(SIKV_KEY_CODEC, "kivi", {}, make_shape(128, SIKV_FP16)).describe();
  EXPECT_EQ(layout.planes[0].bytes_per_tile, 32u);
  EXPECT_EQ(layout.planes[1].organisation, static_cast<uint32_t>(SIKV_SHARED));
  EXPECT_EQ(layout.planes[1].tile_tokens, 32u);
  EXPECT_EQ(layout.planes[1].bytes_per_tile, 512u);
}

}  // namespace
}  // namespace sikv::testing
