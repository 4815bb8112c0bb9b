#include <gtest/gtest.h>

#include "plugins/layouts/rotation.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

const Variant& selector() { return find_variant(SIKV_SELECTOR, "self_indexing_attention"); }

constexpr int kDim = 128, kTokens = 500;
const CacheSpec kSpec{.num_kv_heads = 2, .head_dim = kDim, .encoded = {kTokens}, .pinned = 8};

FilledCache make_cache() {
  const sikv_shape shape = tight_shape(kSpec, 1);
  return FilledCache(kSpec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape), Pattern::kOutliers);
}

std::vector<float> rotated(std::vector<float> x) {
  rotation::forward(x.data(), kDim);
  return x;
}
double norm(const std::vector<float>& x) {
  double squares = 0.0;
  for (const float v : x) squares += double{v} * v;
  return std::sqrt(squares);
}

// Norm-weighted agreement: |k| * sum_i a_i sign((R k)_i), a = sign(R q), or R q itself.
Slots best(const FilledCache& filled, int row, const std::vector<uint8_t>& q, bool signs,
           size_t budget) {
  std::vector<float> query;
  for (int d = 0; d < kDim; ++d) query.push_back(sikv_load(q.data(), kSpec.dtype, row * kDim + d));
  query = rotated(query);
  std::vector<double> scores;
  for (int t = 0; t < kTokens; ++t) {
    const std::vector<float> key = rotated(filled.k.row(0, t, row));
    double sum = 0.0;
    for (size_t d = 0; d < kDim; ++d) {
      const double a = signs ? (query[d] >= 0 ? 1 : -1) : double{query[d]};
      sum += key[d] >= 0 ? a : -a;
    }
    // The norm is kept in fp16.
    uint16_t half;
    sikv_store(&half, SIKV_FP16, 0, static_cast<float>(norm(key)));
    scores.push_back(double{sikv_load(&half, SIKV_FP16, 0)} * sum);
  }
  Slots slots = candidates(filled.cache, row);
  std::stable_sort(slots.begin(), slots.end(), [&](int32_t a, int32_t b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  slots.resize(budget);
  std::sort(slots.begin(), slots.end());
  return slots;
}

TEST(SelfIndexingAttentionTest, RanksByNormWeightedAgreementOfSigns) {
  const FilledCache filled = make_cache();
  SelectorSession session(selector(), {{"budget", "40"}}, filled, 1);
  session.observe_everything();
  for (uint64_t step = 0; step < 4; ++step) {
    const std::vector<uint8_t> q = gaussian_queries(kSpec, 1, 1, 50 + step);
    const std::vector<Slots> rows = session.select(static_cast<int64_t>(step), q);
    expect_equal_but_for_the_cut(rows,
                                 {best(filled, 0, q, true, 40), best(filled, 1, q, true, 40)});
  }
}

// With 8 bits of the query the ranking is that of the unrounded one but for near ties.
TEST(SelfIndexingAttentionTest, MoreBitsOfTheQueryComeCloseToAllOfThem) {
  const FilledCache filled = make_cache();
  SelectorSession session(selector(), {{"budget", "40"}, {"query_bits", "8"}}, filled, 1);
  session.observe_everything();
  const std::vector<uint8_t> q = gaussian_queries(kSpec, 1, 1, 50);
  const std::vector<Slots> rows = session.select(0, q);
  for (int row = 0; row < 2; ++row) {
    const Slots want = best(filled, row, q, false, 40);
    Slots common;
    std::set_intersection(want.begin(), want.end(), rows[static_cast<size_t>(row)].begin(),
                          rows[static_cast<size_t>(row)].end(), std::back_inserter(common));
    EXPECT_GE(common.size(), 37u);
  }
}

}  // namespace
}  // namespace sikv::testing
