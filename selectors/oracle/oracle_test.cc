#include <gtest/gtest.h>

#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

const Variant& oracle() { return find_variant(SIKV_SELECTOR, "oracle"); }

FilledCache make_cache(const CacheSpec& spec, const char* key_codec, const Choices& choices = {},
                       Pattern pattern = Pattern::kGaussian) {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, key_codec, choices, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape), pattern);
}

// The definition, by sorting: mean over the heads of each head's softmax over encoded and tail.
Slots most_probable(const FilledCache& filled, int row, int group, const std::vector<uint8_t>& q,
                    size_t budget) {
  const sikv_cache_view& view = filled.cache.view();
  const int b = row / view.num_kv_heads, h = row % view.num_kv_heads, dim = view.head_dim;
  const int tokens = view.encoded_len[row] + view.tail_len[b];
  std::vector<double> mean(static_cast<size_t>(tokens), 0.0);
  for (int g = 0; g < group; ++g) {
    std::vector<double> p;
    double sum = 0.0;
    for (int t = 0; t < tokens; ++t) {
      double dot = 0.0;
      for (int d = 0; d < dim; ++d) {
        dot += double{sikv_load(q.data(), view.dtype, (int64_t{row} * group + g) * dim + d)} *
               double{filled.k.at(b, t, h, d)};
      }
      p.push_back(std::exp(dot / std::sqrt(dim)));
      sum += p.back();
    }
    for (size_t t = 0; t < p.size(); ++t) mean[t] += p[t] / sum;
  }
  Slots slots = candidates(filled.cache, row);
  std::stable_sort(slots.begin(), slots.end(),
                   [&](int32_t a, int32_t b) { return mean[a] > mean[b]; });
  slots.resize(std::min(budget, slots.size()));
  std::sort(slots.begin(), slots.end());
  return slots;
}

// Whatever the codec left of the keys.
TEST(OracleTest, TakesTheMostProbableTokensByExactKeys) {
  const CacheSpec spec{.num_kv_heads = 2, .encoded = {300, 70}, .tail = {9, 40}, .pinned = 12};
  constexpr int kGroup = 3;
  const std::vector<uint8_t> q = gaussian_queries(spec, kGroup, 1, 5);
  for (const auto& [codec, choices] :
       {std::pair<const char*, Choices>{"fp16", {}}, {"sign_vq", {{"magnitude_bits", "0"}}}}) {
    const FilledCache filled = make_cache(spec, codec, choices);
    SelectorSession session(oracle(), {{"budget", "25"}}, filled, kGroup);
    session.observe_everything();
    const std::vector<Slots> rows = session.select(0, q);
    for (int row = 0; row < filled.cache.num_rows(); ++row) {
      EXPECT_EQ(rows[static_cast<size_t>(row)], most_probable(filled, row, kGroup, q, 25)) << codec;
    }
  }
}

TEST(OracleTest, BreaksTiesTowardsTheLowerSlot) {
  const FilledCache filled =
      make_cache({.num_kv_heads = 1, .encoded = {40}, .pinned = 6}, "fp16", {}, Pattern::kConstant);
  SelectorSession session(oracle(), {{"budget", "10"}}, filled, 2);
  session.observe_everything();
  Slots lowest = candidates(filled.cache, 0);
  lowest.resize(10);
  EXPECT_EQ(session.select(0)[0], lowest);
}

TEST(OracleTest, TakesAFractionOfEncodedAndTail) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {40}, .tail = {17}}, "fp16");
  SelectorSession session(oracle(), {{"budget", "0.25"}}, filled, 1);
  session.observe_everything();
  EXPECT_EQ(session.select(0)[0].size(), 14u);  // floor(57 / 4)
}

TEST(OracleTest, CountsItsCopiesOfEncodedKeys) {
  const FilledCache filled = make_cache(
      {.num_kv_heads = 2, .dtype = SIKV_BF16, .encoded = {300, 70}, .tail = {9, 40}}, "fp16");
  SelectorSession session(oracle(), {}, filled, 1);
  EXPECT_EQ(session.selector().state_bytes(), 0u);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 2u * (300 + 70) * 64 * 2);
  session.selector().begin_sequence(0);
  EXPECT_EQ(session.selector().state_bytes(), 2u * 70 * 64 * 2);
}

}  // namespace
}  // namespace sikv::testing
