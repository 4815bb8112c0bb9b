#include <gtest/gtest.h>

#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

// The count says it all: no list is written, none is planned for, nothing is kept.
TEST(FullTest, SelectsAllWithoutAList) {
  const CacheSpec spec{.encoded = {300, 0}, .tail = {3, 7}};
  const sikv_shape shape = tight_shape(spec, 2);
  const FilledCache filled(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                           make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
  auto full = make_instance<SelectorInstance>(find_variant(SIKV_SELECTOR, "full"), {}, shape);
  EXPECT_EQ(full.plan().capacity, 0);
  Guarded<int32_t> counts(4);
  const std::vector<uint8_t> q = gaussian_queries(spec, 2, 1, 1);
  full.run({sizeof(sikv_select_args),
            4,
            &filled.cache.view(),
            q.data(),
            0.125f,
            0,
            {nullptr, counts.data(), 0, 0},
            nullptr},
           nullptr, nullptr);
  for (size_t row = 0; row < counts.size(); ++row) EXPECT_EQ(counts[row], SIKV_SELECT_ALL);
  EXPECT_EQ(full.state_bytes(), 0u);
}

}  // namespace
}  // namespace sikv::testing
