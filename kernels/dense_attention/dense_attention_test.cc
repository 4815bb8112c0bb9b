#include <gtest/gtest.h>

#include "plugins/sdk/view.h"
#include "tests/support/plugins.h"

namespace sikv::testing {
namespace {

TEST(DenseAttentionTest, RefusesOtherLayoutsAndNamesTheRemedy) {
  const sikv_shape shape = make_shape(64, SIKV_FP16);
  const sikv_layout raw = make_codec(SIKV_KEY_CODEC, "fp16", {}, shape).describe();
  const sikv_layout other = LayoutBuilder("raw", 2, 64).build();
  const auto kernel =
      make_instance<KernelInstance>(find_variant(SIKV_KERNEL, "dense_attention"), {}, shape);
  EXPECT_EQ(kernel.refusal(raw, raw), "");
  EXPECT_EQ(kernel.refusal(other, raw),
            "dense_attention reads layout raw.v1 alone and the keys are stored as raw.v2: use "
            "kernel gather_attention with selector full");
  EXPECT_NE(kernel.refusal(raw, other).find("the values are stored as raw.v2"), std::string::npos);
}

TEST(DenseAttentionTest, SaysThatItAttendsToAll) {
  EXPECT_TRUE(make_instance<KernelInstance>(find_variant(SIKV_KERNEL, "dense_attention"), {},
                                            make_shape(64, SIKV_FP16))
                  .attends_all());
}

}  // namespace
}  // namespace sikv::testing
