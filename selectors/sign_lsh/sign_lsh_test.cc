#include <gtest/gtest.h>

#include <numbers>

#include "kernels/common/gaussian_directions.h"
#include "kernels/common/sign_codes.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

const Variant& sign_lsh() { return find_variant(SIKV_SELECTOR, "sign_lsh"); }

FilledCache make_cache(const CacheSpec& spec, Pattern pattern = Pattern::kGaussian) {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape), pattern);
}

// Goemans and Williamson: a random hyperplane parts two vectors with probability angle / pi.
TEST(SignLshTest, HashesDifferAsOftenAsTheAngleSays) {
  constexpr int kDim = 64, kBits = 512, kSeeds = 40;
  for (const double angle : {0.1, 0.8, 1.6, 2.9}) {
    int differ = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      const std::vector<float> planes = gaussian_directions(seed, kBits * kDim);
      // In the plane of two channels that changes from seed to seed.
      const size_t a = seed % kDim, b = (seed * 7 + 3) % kDim;
      if (a == b) continue;
      for (size_t i = 0; i < kBits; ++i) {
        const double x = planes[i * kDim + a], y = planes[i * kDim + b];
        differ += (x >= 0) != (x * std::cos(angle) + y * std::sin(angle) >= 0);
      }
    }
    // Five deviations of a binomial.
    constexpr double n = kBits * kSeeds;
    const double p = angle / std::numbers::pi;
    EXPECT_NEAR(differ / n, p, 5 * std::sqrt(p * (1 - p) / n)) << angle;
  }
}

// By its definition: sum over the heads of 1 - 2 hamming / bits, times |k|.
Slots best_agreement(const FilledCache& filled, int row, int group, const std::vector<uint8_t>& q,
                     size_t bits, bool norm, bool center, size_t budget) {
  const sikv_cache_view& view = filled.cache.view();
  const int b = row / view.num_kv_heads, h = row % view.num_kv_heads;
  const auto dim = static_cast<size_t>(view.head_dim);
  const std::vector<float> planes = gaussian_directions(7, static_cast<int64_t>(bits * dim));
  const auto hash = [&](const std::vector<float>& x) {
    std::vector<bool> side;
    for (size_t i = 0; i < bits; ++i) {
      float sum = 0.0f;
      for (size_t d = 0; d < dim; ++d) sum += planes[i * dim + d] * x[d];
      side.push_back(sum >= 0.0f);
    }
    return side;
  };
  const int prompt = view.encoded_len[row] + view.tail_len[b];
  std::vector<double> sum(dim);
  for (int t = 0; center && t < prompt; ++t) {
    for (size_t d = 0; d < dim; ++d) sum[d] += filled.k.at(b, t, h, static_cast<int>(d));
  }
  std::vector<std::vector<bool>> queries;
  for (int g = 0; g < group; ++g) {
    std::vector<float> head;
    for (size_t d = 0; d < dim; ++d) {
      head.push_back(sikv_load(q.data(), view.dtype,
                               (int64_t{row} * group + g) * view.head_dim + static_cast<int>(d)));
    }
    queries.push_back(hash(head));
  }
  std::vector<float> scores;
  for (int t = 0; t < view.encoded_len[row]; ++t) {
    std::vector<float> key = filled.k.row(b, t, h);
    double squares = 0.0;
    for (size_t d = 0; d < dim; ++d) {
      key[d] -= static_cast<float>(sum[d] / prompt);
      squares += double{key[d]} * key[d];
    }
    const std::vector<bool> code = hash(key);
    int agreement = 0;
    for (const std::vector<bool>& query : queries) {
      for (size_t i = 0; i < bits; ++i) agreement += query[i] == code[i] ? 1 : -1;
    }
    // The norm is kept in fp16.
    uint16_t half;
    sikv_store(&half, SIKV_FP16, 0, static_cast<float>(std::sqrt(squares)));
    scores.push_back(static_cast<float>(agreement) *
                     (norm ? sikv_load(&half, SIKV_FP16, 0) : 1.0f));
  }
  Slots slots = candidates(filled.cache, row);
  std::stable_sort(slots.begin(), slots.end(), [&](int32_t x, int32_t y) {
    return scores[static_cast<size_t>(x)] > scores[static_cast<size_t>(y)];
  });
  slots.resize(std::min(budget, slots.size()));
  std::sort(slots.begin(), slots.end());
  return slots;
}

TEST(SignLshTest, TakesTheTokensWhoseHashesAgreeMost) {
  const CacheSpec spec{.num_kv_heads = 2, .encoded = {300, 70}, .tail = {9, 40}, .pinned = 12};
  constexpr int kGroup = 2;
  const std::vector<uint8_t> q = gaussian_queries(spec, kGroup, 1, 5);
  const FilledCache filled = make_cache(spec, Pattern::kOffset);
  for (const int bits : {32, 128}) {
    for (const bool norm : {false, true}) {
      for (const bool center : {false, true}) {
        SelectorSession session(sign_lsh(),
                                {{"budget", "25"},
                                 {"bits", std::to_string(bits)},
                                 {"norm", norm ? "true" : "false"},
                                 {"center", center ? "true" : "false"},
                                 {"seed", "7"}},
                                filled, kGroup);
        session.observe_everything();
        const std::vector<Slots> rows = session.select(0, q);
        std::vector<Slots> want;
        for (int row = 0; row < filled.cache.num_rows(); ++row) {
          want.push_back(
              best_agreement(filled, row, kGroup, q, static_cast<size_t>(bits), norm, center, 25));
        }
        expect_equal_but_for_the_cut(rows, want);
      }
    }
  }
}

TEST(SignLshTest, OtherSeedsHashOtherwise) {
  const FilledCache filled = make_cache({.num_kv_heads = 1, .encoded = {512}});
  std::vector<Slots> selections;
  for (const char* seed : {"0", "1"}) {
    SelectorSession session(sign_lsh(), {{"budget", "64"}, {"seed", seed}}, filled, 1);
    session.observe_everything();
    selections.push_back(session.select(0)[0]);
  }
  EXPECT_NE(selections[0], selections[1]);
}

}  // namespace
}  // namespace sikv::testing
