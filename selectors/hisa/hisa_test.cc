#include <gtest/gtest.h>

#include "tests/support/ranking.h"

namespace sikv::testing {
namespace {

const Variant& hisa() { return find_variant(SIKV_SELECTOR, "hisa"); }

FilledCache make_cache(const CacheSpec& spec, const char* key_codec = "fp16") {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, key_codec, {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
}

std::vector<float> stored_key(const FilledCache& filled, int row, int slot) {
  return decode_slots(filled.key, filled.cache, row, std::vector<int32_t>{slot});
}

// Both levels as the paper has them: blocks by the mean of their keys, first and last in any case,
// then tokens of these blocks by their own keys, as the cache stores them.
Slots two_levels(const FilledCache& filled, int row, const std::vector<uint8_t>& q, int group,
                 int block_tokens, int blocks, size_t budget) {
  const int encoded = filled.cache.view().encoded_len[row];
  std::vector<float> sum = query_of(filled, q, row, group, 0);
  for (int g = 1; g < group; ++g) {
    const std::vector<float> head = query_of(filled, q, row, group, g);
    for (size_t d = 0; d < sum.size(); ++d) sum[d] += head[d];
  }
  std::vector<std::pair<double, int>> order;
  const int all = (encoded + block_tokens - 1) / block_tokens;
  for (int b = 0; b < all; ++b) {
    double score = 0.0;
    const int end = std::min(encoded, (b + 1) * block_tokens);
    for (int t = b * block_tokens; t < end; ++t) score += dot(sum, key_of(filled, row, t));
    score /= end - b * block_tokens;
    order.emplace_back(b == 0 || b == all - 1 ? -1e9 : -score, b);
  }
  std::sort(order.begin(), order.end());
  std::vector<bool> chosen(static_cast<size_t>(all));
  for (int i = 0; i < std::min(blocks, all); ++i)
    chosen[static_cast<size_t>(order[static_cast<size_t>(i)].second)] = true;
  return best_slots(filled, row, budget, [&](int slot) {
    return chosen[static_cast<size_t>(slot / block_tokens)]
               ? dot(sum, stored_key(filled, row, slot))
               : -1e9;
  });
}

TEST(HisaTest, ChoosesBlocksThenTokens) {
  const CacheSpec spec{.num_kv_heads = 2, .encoded = {1003, 300}, .tail = {9, 0}, .pinned = 12};
  const std::vector<uint8_t> q = gaussian_queries(spec, 3, 1, 5);
  for (const char* codec : {"fp16", "rot_lm"}) {
    const FilledCache filled = make_cache(spec, codec);
    for (const int block_tokens : {16, 64}) {
      SelectorSession session(
          hisa(),
          {{"budget", "40"}, {"block_tokens", std::to_string(block_tokens)}, {"blocks", "8"}},
          filled, 3);
      session.observe_everything();
      std::vector<Slots> want;
      for (int row = 0; row < 4; ++row) {
        want.push_back(two_levels(filled, row, q, 3, block_tokens, 8, 40));
      }
      expect_equal_but_for_the_cut(session.select(0, q), want);
    }
  }
}

// With candidates for all of a sequence the first level changes nothing.
TEST(HisaTest, RanksAllTokensWhereAllBlocksAreChosen) {
  const CacheSpec spec{.num_kv_heads = 1, .encoded = {300}, .pinned = 5};
  const FilledCache filled = make_cache(spec);
  const std::vector<uint8_t> q = gaussian_queries(spec, 1, 1, 5);
  SelectorSession session(hisa(), {{"budget", "40"}}, filled, 1);
  session.observe_everything();
  const std::vector<float> head = query_of(filled, q, 0);
  expect_equal_but_for_the_cut(session.select(0, q), {best_slots(filled, 0, 40, [&](int slot) {
                                 return dot(head, stored_key(filled, 0, slot));
                               })});
}

// One block would hold 16 tokens; a budget of 100 beside 12 pinned ones takes as many as it needs.
TEST(HisaTest, FillsTheBudget) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {1003}, .pinned = 12});
  SelectorSession session(hisa(), {{"budget", "100"}, {"block_tokens", "16"}, {"blocks", "1"}},
                          filled, 1);
  session.observe_everything();
  EXPECT_EQ(session.select(0)[0].size(), 100u);
}

// Pooled keys in fp32; a step reads them and the keys of the chosen blocks as the cache has them.
TEST(HisaTest, CountsPooledKeysAndWhatItReads) {
  const FilledCache filled = make_cache({.num_kv_heads = 2, .encoded = {1024}});
  SelectorSession session(hisa(), {{"budget", "100"}, {"block_tokens", "64"}, {"blocks", "0"}},
                          filled, 1);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 2u * 16 * 64 * 4);
  session.select(0);
  EXPECT_EQ(counters_of(session).at("runs"), 2.0);
  EXPECT_EQ(counters_of(session).at("scan_bytes"), 2.0 * (16 * 64 * 4 + 4 * 64 * 64 * 2));
}

}  // namespace
}  // namespace sikv::testing
