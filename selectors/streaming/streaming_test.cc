#include <gtest/gtest.h>

#include "framework/base/error.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

const Variant& streaming() { return find_variant(SIKV_SELECTOR, "streaming"); }

FilledCache make_cache(const CacheSpec& spec, const char* key_codec = "fp16") {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, key_codec, {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
}

Slots range(int32_t first, int32_t end) {
  Slots slots(static_cast<size_t>(end - first));
  std::iota(slots.begin(), slots.end(), first);
  return slots;
}

Slots operator+(Slots a, const Slots& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

Slots select(const FilledCache& filled, const Choices& choices) {
  SelectorSession session(streaming(), choices, filled, 1);
  session.observe_everything();
  return session.select(0)[0];
}

// The keep-list of row 0; nothing where all is kept.
std::optional<Slots> keep(const FilledCache& filled, const Choices& choices) {
  SelectorSession session(streaming(), choices, filled, 1);
  const auto rows = static_cast<size_t>(filled.cache.num_rows());
  Slots slots(rows * static_cast<size_t>(filled.cache.view().max_encoded_len)), counts(rows);
  session.selector().evict(
      {sizeof(sikv_evict_args), 0, &filled.cache.view(), slots.data(), counts.data()}, nullptr,
      nullptr);
  if (counts[0] == SIKV_SELECT_ALL) return std::nullopt;
  slots.resize(static_cast<size_t>(counts[0]));
  return slots;
}

TEST(StreamingTest, SelectsSinksAndTheNewest) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {500}, .tail = {9}});
  EXPECT_EQ(select(filled, {{"budget", "10"}}), range(0, 4) + range(494, 500));
  EXPECT_EQ(select(filled, {{"budget", "10"}, {"sinks", "0"}}), range(490, 500));
  EXPECT_EQ(select(filled, {{"budget", "3"}}), range(0, 3));
  EXPECT_EQ(select(filled, {{"budget", "0"}}), Slots());
  EXPECT_EQ(select(filled, {}), range(0, 4) + range(248, 500));
}

TEST(StreamingTest, CountsNoPinnedToken) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {40}, .pinned = 20});
  const Slots open = candidates(filled.cache, 0);
  const Slots slots = select(filled, {{"budget", "8"}});
  const auto sinks = std::lower_bound(open.begin(), open.end(), 4) - open.begin();
  EXPECT_EQ(slots, Slots(open.begin(), open.begin() + sinks) +
                       Slots(open.end() - (8 - sinks), open.end()));
}

TEST(StreamingTest, KeepsAllUnlessToldToEvict) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {500}});
  EXPECT_EQ(keep(filled, {{"budget", "10"}}), std::nullopt);
  EXPECT_EQ(keep(filled, {{"budget", "500"}, {"evict", "true"}}), std::nullopt);
  EXPECT_EQ(keep(filled, {{"budget", "10"}, {"evict", "true"}}), range(0, 4) + range(494, 500));
}

// kivi's channel scales serve 32 tokens: those cannot part.
TEST(StreamingTest, KeepsWholePagesWhereTokensShareBytes) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {1280}}, "kivi");
  EXPECT_EQ(keep(filled, {{"budget", "10"}, {"evict", "true"}}), range(0, 256) + range(1024, 1280));
  EXPECT_EQ(keep(filled, {{"budget", "300"}, {"evict", "true"}}), range(0, 256) + range(768, 1280));
  EXPECT_EQ(keep(filled, {{"budget", "1100"}, {"evict", "true"}}), std::nullopt);
}

TEST(StreamingTest, KeepsThePagesOfPinnedTokens) {
  const FilledCache filled =
      make_cache({.num_kv_heads = 1, .encoded = {1280}, .pinned = 1, .seed = 4}, "kivi");
  const int32_t page = filled.cache.view().pinned_slots[0] / 256;
  ASSERT_TRUE(page > 0 && page < 4) << "the case needs another seed";
  EXPECT_EQ(keep(filled, {{"budget", "10"}, {"evict", "true"}}),
            range(0, 256) + range(page * 256, page * 256 + 256) + range(1024, 1280));
}

TEST(StreamingTest, RefusesToEvictByAFraction) {
  try {
    make_instance<SelectorInstance>(streaming(), {{"budget", "0.5"}, {"evict", "true"}},
                                    make_shape(64, SIKV_FP16));
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("takes its budget in tokens"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace sikv::testing
