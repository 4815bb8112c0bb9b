#include <gtest/gtest.h>

#include <set>

#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

const Variant& random_selector() { return find_variant(SIKV_SELECTOR, "random"); }

FilledCache make_cache(const CacheSpec& spec) {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
}

TEST(RandomTest, DrawsAnewForEverySeedLayerRowAndStep) {
  CacheSpec spec{.num_kv_heads = 2, .encoded = {100, 100}, .pinned = 0};
  std::set<Slots> draws;
  for (spec.layer = 0; spec.layer < 2; ++spec.layer) {
    const FilledCache filled = make_cache(spec);
    for (const char* seed : {"1", "2"}) {
      SelectorSession session(random_selector(), {{"budget", "20"}, {"seed", seed}}, filled, 1);
      for (int step = 0; step < 3; ++step) {
        for (const Slots& slots : session.select(step)) draws.insert(slots);
      }
    }
  }
  EXPECT_EQ(draws.size(), 2u * 2 * 3 * 4);
}

// Every unpinned slot is drawn in budget / unpinned of the steps; 5 standard deviations of slack.
TEST(RandomTest, DrawsUniformly) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {50}, .pinned = 10});
  SelectorSession session(random_selector(), {{"budget", "8"}}, filled, 1);
  constexpr int kSteps = 4000;
  std::vector<int> drawn(50, 0);
  for (int step = 0; step < kSteps; ++step) {
    const Slots slots = session.select(step)[0];
    ASSERT_EQ(slots.size(), 8u);
    for (int32_t slot : slots) ++drawn[static_cast<size_t>(slot)];
  }
  const double p = 8.0 / 40.0, slack = 5.0 * std::sqrt(kSteps * p * (1.0 - p));
  for (int32_t slot : candidates(filled.cache, 0)) {
    EXPECT_NEAR(drawn[static_cast<size_t>(slot)], kSteps * p, slack);
  }
}

}  // namespace
}  // namespace sikv::testing
