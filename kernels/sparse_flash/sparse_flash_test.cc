#include <gtest/gtest.h>

#include "plugins/sdk/view.h"
#include "tests/support/plugins.h"

namespace sikv::testing {
namespace {

TEST(SparseFlashTest, ReadsEveryLayoutOfTheToolkitsCodecs) {
  const sikv_shape shape = make_shape(128, SIKV_FP16);
  const auto kernel =
      make_instance<KernelInstance>(find_variant(SIKV_KERNEL, "sparse_flash"), {}, shape);
  for (const char* key : {"fp16", "kivi", "rot_lm", "sign_vq"}) {
    for (const char* value : {"fp16", "intq", "kivi", "rot_lm"}) {
      EXPECT_EQ(kernel.refusal(make_codec(SIKV_KEY_CODEC, key, {}, shape).describe(),
                               make_codec(SIKV_VALUE_CODEC, value, {}, shape).describe()),
                "");
    }
  }
}

TEST(SparseFlashTest, RefusesOtherLayoutsAndNamesTheRemedy) {
  const sikv_shape shape = make_shape(64, SIKV_FP16);
  const sikv_layout raw = make_codec(SIKV_KEY_CODEC, "fp16", {}, shape).describe();
  const sikv_layout newer = LayoutBuilder("sign4", 2, 64).build();
  const auto kernel =
      make_instance<KernelInstance>(find_variant(SIKV_KERNEL, "sparse_flash"), {}, shape);
  EXPECT_EQ(kernel.refusal(newer, raw),
            "sparse_flash cannot read keys stored as sign4.v2: use kernel gather_attention, which "
            "reads every layout");
  EXPECT_NE(kernel.refusal(raw, newer).find("values stored as sign4.v2"), std::string::npos);
}

}  // namespace
}  // namespace sikv::testing
