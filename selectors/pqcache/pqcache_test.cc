#include <gtest/gtest.h>

#include <cmath>

#include "framework/base/error.h"
#include "selectors/pqcache/product_quantiser.h"
#include "tests/support/ranking.h"

namespace sikv::testing {
namespace {

using pqcache::ProductQuantiser;

constexpr int kDim = 64;

const Variant& pqcache_ref() { return find_variant(SIKV_SELECTOR, "pqcache"); }

FilledCache make_cache(const CacheSpec& spec, Pattern pattern = Pattern::kOffset) {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape), pattern);
}

std::vector<float> gaussian(int n, uint64_t seed) {
  std::vector<float> rows(static_cast<size_t>(n));
  Random(seed).fill_normal(rows);
  return rows;
}

// What tables and codes say q.k is, and how far off that can be.
struct Estimate {
  double value, bound;
};
Estimate estimate(const ProductQuantiser& quantiser, std::span<const float> q,
                  std::span<const float> key, int entries) {
  const int parts = quantiser.subspaces(), part = kDim / parts;
  std::vector<float> tables(static_cast<size_t>(parts * entries));
  std::vector<uint8_t> codes(static_cast<size_t>(parts));
  quantiser.tables(q.data(), tables.data());
  quantiser.encode(key.data(), codes.data());
  Estimate result{0.0, 0.0};
  for (int s = 0; s < parts; ++s) {
    const int code = codes[static_cast<size_t>(s)];
    result.value += tables[static_cast<size_t>(s * entries + code)];
    double q_square = 0.0, rest_square = 0.0;
    for (int d = 0; d < part; ++d) {
      const auto at = static_cast<size_t>(s * part + d);
      const double rest = double{key[at]} - quantiser.part(s).at(code, d);
      q_square += double{q[at]} * q[at];
      rest_square += rest * rest;
    }
    result.bound += std::sqrt(q_square * rest_square);
  }
  return result;
}

// On keys it was fitted on and on others; and where queries lie along what is lost, the bound is
// reached.
TEST(PqCacheTest, ErrsByNoMoreThanTheBound) {
  constexpr int kRows = 400;
  const std::vector<float> rows = gaussian(kRows * kDim, 1), others = gaussian(kRows * kDim, 2),
                           queries = gaussian(20 * kDim, 3);
  for (const auto& [parts, entries] : {std::pair{1, 16}, {2, 64}, {4, 64}, {8, 256}}) {
    const ProductQuantiser quantiser(rows, kRows, kDim, parts, entries, 10);
    for (const std::vector<float>& keys : {rows, others}) {
      for (int i = 0; i < kRows; ++i) {
        const auto key = std::span(keys).subspan(static_cast<size_t>(i * kDim), kDim);
        const auto q = std::span(queries).subspan(static_cast<size_t>(i % 20 * kDim), kDim);
        const Estimate e = estimate(quantiser, q, key, entries);
        double exact = 0.0;
        for (size_t d = 0; d < kDim; ++d) exact += double{q[d]} * key[d];
        ASSERT_LE(std::abs(e.value - exact), e.bound + 1e-4);

        std::vector<float> lost(kDim);
        std::vector<uint8_t> codes(static_cast<size_t>(parts));
        quantiser.encode(key.data(), codes.data());
        for (int d = 0; d < kDim; ++d) {
          const int part = kDim / parts;
          lost[static_cast<size_t>(d)] =
              key[static_cast<size_t>(d)] -
              quantiser.part(d / part).at(codes[static_cast<size_t>(d / part)], d % part);
        }
        const Estimate along = estimate(quantiser, lost, key, entries);
        double product = 0.0;
        for (size_t d = 0; d < kDim; ++d) product += double{lost[d]} * key[d];
        EXPECT_NEAR(product - along.value, along.bound, 1e-3 * (1.0 + along.bound));
      }
    }
  }
}

// The squared error of a code with more centroids, or of more parts, is smaller.
TEST(PqCacheTest, ErrsLessWithMoreBits) {
  constexpr int kRows = 1000;
  const std::vector<float> rows = gaussian(kRows * kDim, 1);
  double before = std::numeric_limits<double>::infinity();
  for (const auto& [parts, entries] : {std::pair{1, 4}, {1, 64}, {2, 64}, {4, 64}, {8, 256}}) {
    const ProductQuantiser quantiser(rows, kRows, kDim, parts, entries, 10);
    double error = 0.0;
    for (int i = 0; i < kRows; ++i) {
      std::vector<uint8_t> codes(static_cast<size_t>(parts));
      quantiser.encode(&rows[static_cast<size_t>(i * kDim)], codes.data());
      for (int d = 0; d < kDim; ++d) {
        const int part = kDim / parts;
        const double rest =
            rows[static_cast<size_t>(i * kDim + d)] -
            quantiser.part(d / part).at(codes[static_cast<size_t>(d / part)], d % part);
        error += rest * rest;
      }
    }
    EXPECT_LT(error, 0.97 * before) << parts << " parts of " << entries;
    before = error;
  }
}

// Selected are the best by the estimate; so none that was left out is better than one that was
// taken by more than both can be off.
TEST(PqCacheTest, TakesTheBestWithinTheBound) {
  const CacheSpec spec{
      .num_kv_heads = 2, .dtype = SIKV_FP32, .encoded = {300, 70}, .tail = {9, 0}, .pinned = 12};
  const FilledCache filled = make_cache(spec);
  const std::vector<uint8_t> q = gaussian_queries(spec, 1, 1, 5);
  for (const int parts : {2, 8}) {
    SelectorSession session(pqcache_ref(),
                            {{"budget", "40"},
                             {"subspaces", std::to_string(parts)},
                             {"bits", "4"},
                             {"sinks", "0"},
                             {"recent", "0"}},
                            filled, 1);
    session.observe_everything();
    const std::vector<Slots> rows = session.select(0, q);
    std::vector<Slots> want;
    for (int row = 0; row < 4; ++row) {
      std::vector<float> keys;
      const int count = filled.k.count(row / 2);
      for (int t = 0; t < count; ++t) {
        const std::vector<float> key = key_of(filled, row, t);
        keys.insert(keys.end(), key.begin(), key.end());
      }
      const ProductQuantiser quantiser(keys, count, kDim, parts, 16, 10);
      const std::vector<float> head = query_of(filled, q, row);
      const auto of = [&](int slot) {
        return estimate(quantiser, head, key_of(filled, row, slot), 16);
      };
      want.push_back(best_slots(filled, row, 40, [&](int slot) { return of(slot).value; }));
      const Slots& taken = rows[static_cast<size_t>(row)];
      double least = std::numeric_limits<double>::infinity();
      for (int32_t slot : taken) {
        least = std::min(least, dot(head, key_of(filled, row, slot)) + of(slot).bound);
      }
      for (int32_t slot : candidates(filled.cache, row)) {
        if (std::binary_search(taken.begin(), taken.end(), slot)) continue;
        EXPECT_LE(dot(head, key_of(filled, row, slot)) - of(slot).bound, least + 1e-4);
      }
    }
    expect_equal_but_for_the_cut(rows, want);
  }
}

// Half of 80 are the newest, of which 9 are in the tail; 16 are the first.
TEST(PqCacheTest, TakesSinksAndTheNewestTokens) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {300}, .tail = {9}});
  SelectorSession session(pqcache_ref(), {{"budget", "80"}, {"sinks", "16"}}, filled, 1);
  session.observe_everything();
  const Slots slots = session.select(0)[0];
  ASSERT_EQ(slots.size(), 80u);
  for (int32_t i = 0; i < 16; ++i) EXPECT_EQ(slots[static_cast<size_t>(i)], i);
  for (int32_t i = 0; i < 31; ++i) EXPECT_EQ(slots[static_cast<size_t>(79 - i)], 299 - i);
}

// Where sinks and newest are more than the budget, as many of the newest stay as the sinks leave.
TEST(PqCacheTest, TakesTheVeryNewestBesideTheSinks) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {300}});
  SelectorSession session(pqcache_ref(), {{"budget", "80"}, {"sinks", "16"}, {"recent", "1"}},
                          filled, 1);
  session.observe_everything();
  const Slots slots = session.select(0)[0];
  ASSERT_EQ(slots.size(), 80u);
  for (int32_t i = 0; i < 80; ++i) EXPECT_EQ(slots[static_cast<size_t>(i)], i < 16 ? i : 220 + i);
}

// 64 centroids of D numbers in fp32 per row; a byte per part and token, in pages.
TEST(PqCacheTest, CountsCodesAndCentroids) {
  const FilledCache filled = make_cache({.num_kv_heads = 2, .encoded = {300, 270}});
  SelectorSession session(pqcache_ref(), {{"subspaces", "4"}}, filled, 1);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 4u * 64 * 64 * 4 + 2u * (512 + 512) * 4);
  session.select(0);
  EXPECT_EQ(counters_of(session).at("scan_bytes"), 4.0 * 64 * 64 * 4 + 2.0 * (300 + 270) * 4);
}

}  // namespace
}  // namespace sikv::testing
