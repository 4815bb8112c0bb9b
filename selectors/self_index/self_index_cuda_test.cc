// What the CUDA variant refuses when it is made. Needs no GPU: none is asked.
#include <gtest/gtest.h>

#include "framework/base/error.h"
#include "tests/support/plugins.h"

namespace sikv::testing {
namespace {

std::string answer(int head_dim, int group) {
  Registry registry([](sikv_device_type) { return std::string(); });
  registry.add_library(SIKV_SELF_INDEX_CUDA);
  const Variant& variant = registry.find(SIKV_SELECTOR, "self_index", "cuda");
  sikv_device device = cpu().info();
  device.type = SIKV_CUDA;
  device.compute_capability = 90;
  try {
    const SelectorInstance made(variant, OptionSet::parse(variant.options, {}, variant.id),
                                make_shape(head_dim, SIKV_FP16, 2, group), device, cpu().host());
  } catch (const Error& error) {
    return error.what();
  }
  return "made";
}

TEST(SelfIndexCudaTest, RefusesShapesThatItHasNoKernelsFor) {
  EXPECT_EQ(answer(128, 16), "made");
  EXPECT_EQ(answer(128, 17),
            "selector 'self_index' (cuda): self_index on a GPU takes up to 16 query heads per KV "
            "head, not 17: run on device cpu");
  EXPECT_EQ(answer(80, 1),
            "selector 'self_index' (cuda): self_index on a GPU takes head_dim 64, 96, 128 or 256, "
            "not 80: run on device cpu");
}

}  // namespace
}  // namespace sikv::testing
