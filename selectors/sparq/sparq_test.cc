#include <gtest/gtest.h>

#include "tests/support/ranking.h"

namespace sikv::testing {
namespace {

const Variant& sparq() { return find_variant(SIKV_SELECTOR, "sparq"); }

FilledCache make_cache(const CacheSpec& spec) {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
}

// The channels of the largest |q|, summed over the group, ascending.
std::vector<size_t> largest(const std::vector<std::vector<float>>& heads, size_t count) {
  std::vector<std::pair<double, size_t>> order;
  for (size_t d = 0; d < heads[0].size(); ++d) {
    double size = 0.0;
    for (const auto& head : heads) size += std::abs(head[d]);
    order.emplace_back(-size, d);
  }
  std::sort(order.begin(), order.end());
  std::vector<size_t> channels;
  for (size_t i = 0; i < count; ++i) channels.push_back(order[i].second);
  return channels;
}

// Head by head as the paper writes it: logits over the largest channels, divided by
// sqrt(D sum |q read| / sum |q|), summed over the group.
TEST(SparqTest, ReadsTheLargestChannelsOfTheQuery) {
  const CacheSpec spec{.num_kv_heads = 2, .encoded = {300, 70}, .tail = {9, 0}, .pinned = 12};
  const FilledCache filled = make_cache(spec);
  const std::vector<uint8_t> q = gaussian_queries(spec, 3, 1, 5);
  for (const size_t channels : {1u, 8u, 64u}) {
    SelectorSession session(
        sparq(), {{"budget", "40"}, {"channels", std::to_string(channels)}, {"local", "0"}}, filled,
        3);
    session.observe_everything();
    std::vector<Slots> want;
    for (int row = 0; row < filled.cache.num_rows(); ++row) {
      std::vector<std::vector<float>> heads;
      for (int g = 0; g < 3; ++g) heads.push_back(query_of(filled, q, row, 3, g));
      const std::vector<size_t> read = largest(heads, channels);
      want.push_back(best_slots(filled, row, 40, [&](int slot) {
        const std::vector<float> key = key_of(filled, row, slot);
        double score = 0.0;
        for (const std::vector<float>& head : heads) {
          double logit = 0.0, part = 0.0, all = 0.0;
          for (size_t d : read) logit += double{head[d]} * key[d], part += std::abs(head[d]);
          for (float x : head) all += std::abs(x);
          score += logit / std::sqrt(64.0 * part / all);
        }
        return score;
      }));
    }
    expect_equal_but_for_the_cut(session.select(0, q), want);
  }
}

// 9 of the 32 newest tokens are in the tail of the first sequence.
TEST(SparqTest, TakesTheNewestTokens) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {300, 70}, .tail = {9, 40}});
  SelectorSession session(sparq(), {{"budget", "40"}, {"local", "32"}}, filled, 1);
  SelectorSession without(sparq(), {{"budget", "40"}, {"local", "0"}}, filled, 1);
  session.observe_everything();
  without.observe_everything();
  const std::vector<Slots> rows = session.select(0);
  for (int32_t slot = 277; slot < 300; ++slot) {
    EXPECT_TRUE(std::binary_search(rows[0].begin(), rows[0].end(), slot)) << slot;
  }
  EXPECT_EQ(rows[0].size(), 40u);
  EXPECT_EQ(rows[1], without.select(0)[1]);
}

TEST(SparqTest, TakesTheVeryNewestWhereLocalIsMoreThanTheBudget) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {300}, .tail = {9}});
  SelectorSession session(sparq(), {{"budget", "40"}, {"local", "100"}}, filled, 1);
  session.observe_everything();
  Slots newest(40);
  std::iota(newest.begin(), newest.end(), 260);
  EXPECT_EQ(session.select(0)[0], newest);
}

// A second copy of the keys in pages, of which a step reads some channels.
TEST(SparqTest, CountsItsCopyOfTheKeys) {
  const FilledCache filled =
      make_cache({.num_kv_heads = 2, .dtype = SIKV_BF16, .encoded = {300, 70}, .tail = {9, 40}});
  SelectorSession session(sparq(), {{"channels", "16"}}, filled, 1);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 2u * (512 + 256) * 64 * 2);
  session.select(0);
  EXPECT_EQ(counters_of(session).at("runs"), 4.0);
  EXPECT_EQ(counters_of(session).at("scan_bytes"), 2.0 * (300 + 70) * 16 * 2);
}

}  // namespace
}  // namespace sikv::testing
