#include <gtest/gtest.h>

#include "plugins/sdk/view.h"
#include "tests/support/plugins.h"

namespace sikv::testing {
namespace {

TEST(GatherAttentionTest, ReadsLayoutsItHasNeverHeardOf) {
  const sikv_layout layout = LayoutBuilder("somebody_elses", 7, 64).build();
  const auto kernel = make_instance<KernelInstance>(find_variant(SIKV_KERNEL, "gather_attention"),
                                                    {}, make_shape(64, SIKV_FP16));
  EXPECT_EQ(kernel.refusal(layout, layout), "");
  EXPECT_FALSE(kernel.attends_all());
}

}  // namespace
}  // namespace sikv::testing
