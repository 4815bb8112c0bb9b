#include <gtest/gtest.h>

#include "tests/support/ranking.h"

namespace sikv::testing {
namespace {

const Variant& double_sparsity() { return find_variant(SIKV_SELECTOR, "double_sparsity"); }

FilledCache make_cache(const CacheSpec& spec) {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
}

CacheSpec two_sequences() {
  return {.num_kv_heads = 2, .encoded = {300, 70}, .tail = {9, 0}, .pinned = 12};
}

// Channels 3 + h, 17 and 40 of the keys of KV head h are much wider than the others: they are
// heavy by |k|, and by |q| |k| where the queries are as wide everywhere.
TEST(DoubleSparsityTest, ReadsTheHeavyChannels) {
  FilledCache filled = make_cache(two_sequences());
  for (int b = 0; b < 2; ++b) {
    for (int t = 0; t < filled.k.count(b); ++t) {
      for (int h = 0; h < 2; ++h) {
        for (int d : {3 + h, 17, 40}) {
          filled.k.set(b, t, h, d, 20.0f * filled.k.at(b, t, h, d));
        }
      }
    }
  }
  const std::vector<uint8_t> q = gaussian_queries(filled.cache.spec(), 1, 1, 5);
  for (const char* ranking : {"k", "qk"}) {
    SelectorSession session(double_sparsity(),
                            {{"budget", "40"}, {"channels", "3"}, {"ranking", ranking}}, filled, 1);
    session.observe_everything();
    std::vector<Slots> want;
    for (int row = 0; row < 4; ++row) {
      const std::vector<float> head = query_of(filled, q, row);
      want.push_back(best_slots(filled, row, 40, [&](int slot) {
        const std::vector<float> key = key_of(filled, row, slot);
        double sum = 0.0;
        for (int d : {3 + row % 2, 17, 40}) {
          sum += double{head[static_cast<size_t>(d)]} * key[static_cast<size_t>(d)];
        }
        return sum;
      }));
    }
    expect_equal_but_for_the_cut(session.select(0, q), want);
  }
}

TEST(DoubleSparsityTest, RanksExactlyOnAllChannels) {
  const FilledCache filled = make_cache(two_sequences());
  const std::vector<uint8_t> q = gaussian_queries(filled.cache.spec(), 1, 1, 5);
  for (const char* ranking : {"q", "k", "qk"}) {
    SelectorSession session(
        double_sparsity(), {{"budget", "40"}, {"channels", "64"}, {"ranking", ranking}}, filled, 1);
    session.observe_everything();
    std::vector<Slots> want;
    for (int row = 0; row < 4; ++row) {
      const std::vector<float> head = query_of(filled, q, row);
      want.push_back(best_slots(filled, row, 40,
                                [&](int slot) { return dot(head, key_of(filled, row, slot)); }));
    }
    expect_equal_but_for_the_cut(session.select(0, q), want);
  }
}

// Queries of the window decide by |q|: 4 positions of unit normals, by which all rows differ.
TEST(DoubleSparsityTest, RanksChannelsByTheWindowsQueries) {
  const CacheSpec spec = two_sequences();
  const FilledCache filled = make_cache(spec);
  const std::vector<uint8_t> window = gaussian_queries(spec, 2, 4, 100);
  const std::vector<uint8_t> q = gaussian_queries(spec, 2, 1, 5);
  SelectorSession session(double_sparsity(),
                          {{"budget", "40"}, {"channels", "1"}, {"ranking", "q"}}, filled, 2);
  session.observe_everything();
  std::vector<Slots> want;
  for (int row = 0; row < 4; ++row) {
    std::vector<double> size(64);
    for (int w = 0; w < 4; ++w) {
      for (int g = 0; g < 2; ++g) {
        for (int d = 0; d < 64; ++d) {
          const int64_t head = (row / 2 * 4 + w) * 4 + row % 2 * 2 + g;
          size[static_cast<size_t>(d)] +=
              std::abs(sikv_load(window.data(), spec.dtype, head * 64 + d));
        }
      }
    }
    const auto heavy =
        static_cast<size_t>(std::max_element(size.begin(), size.end()) - size.begin());
    std::vector<double> mean(static_cast<size_t>(spec.encoded[static_cast<size_t>(row / 2)]));
    for (int g = 0; g < 2; ++g) {
      // Times sqrt(D / channels) / sqrt(D).
      const double x = query_of(filled, q, row, 2, g)[heavy];
      double sum = 0.0;
      std::vector<double> weight;
      for (int slot = 0; slot < std::ssize(mean); ++slot) {
        weight.push_back(std::exp(x * key_of(filled, row, slot)[heavy]));
        sum += weight.back();
      }
      for (size_t i = 0; i < mean.size(); ++i) mean[i] += weight[i] / sum;
    }
    want.push_back(
        best_slots(filled, row, 40, [&](int slot) { return mean[static_cast<size_t>(slot)]; }));
  }
  expect_equal_but_for_the_cut(session.select(0, q), want);
}

// A row's channel numbers, and these channels of its pages in the input type.
TEST(DoubleSparsityTest, CountsItsLabels) {
  const FilledCache filled =
      make_cache({.num_kv_heads = 2, .dtype = SIKV_BF16, .encoded = {300, 70}, .tail = {9, 40}});
  SelectorSession session(double_sparsity(), {}, filled, 1);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 4u * 16 * 4 + 2u * (512 + 256) * 16 * 2);
  session.select(0);
  EXPECT_EQ(counters_of(session).at("runs"), 4.0);
  EXPECT_EQ(counters_of(session).at("scan_bytes"), 2.0 * (300 + 70) * 16 * 2);
}

}  // namespace
}  // namespace sikv::testing
