#include <gtest/gtest.h>

#include <cstring>

#include "framework/base/error.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

TEST(Fp16Test, KeepsRowsInTheInputType) {
  for (const int32_t dtype : {SIKV_FP32, SIKV_FP16, SIKV_BF16}) {
    CodecInstance codec = make_codec(SIKV_VALUE_CODEC, "fp16", {}, make_shape(64, dtype));
    TestRows v({3}, 2, 64, dtype);
    v.fill(Pattern::kGaussian, 1);
    TestCache cache({.dtype = dtype, .encoded = {3}}, {}, codec.describe());
    fit_and_encode(codec, v, cache);
    const size_t row_bytes = 64 * static_cast<size_t>(sikv_dtype_bytes(dtype));
    const uint8_t* page = cache.page(SIKV_VALUE_CODEC, SIKV_VALUE_CODE, 1, 0);
    EXPECT_EQ(std::memcmp(page + 2 * row_bytes, v.address(0, 2, 1), row_bytes), 0);
    const int32_t slot = 2;
    EXPECT_EQ(decode_slots(codec, cache, 1, {&slot, 1}), v.row(0, 2, 1));
  }
}

TEST(Fp16Test, RefusesOtherHeadDimensions) {
  try {
    make_codec(SIKV_KEY_CODEC, "fp16", {}, make_shape(80, SIKV_FP16));
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("64, 96, 128 or 256, not 80"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace sikv::testing
