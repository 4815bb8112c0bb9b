#include "selectors/magicpig/magicpig.h"

#include <gtest/gtest.h>

#include <random>

#include "framework/base/error.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

const Variant& magicpig() { return find_variant(SIKV_SELECTOR, "magicpig"); }

constexpr int kGroup = 2, kDim = 64;
const CacheSpec kSpec{.num_kv_heads = 2, .dtype = SIKV_FP32, .encoded = {300}};

FilledCache make_cache(const CacheSpec& spec) {
  const sikv_shape shape = tight_shape(spec, kGroup);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape), Pattern::kOffset);
}

Choices few_tables(uint64_t seed) {
  return {{"bits", "4"}, {"tables", "12"}, {"epsilon", "0"}, {"seed", std::to_string(seed)}};
}

// Of every query head: the numerator of its attention, and as last number the denominator.
using Sums = std::vector<std::vector<double>>;

class Sampler {
 public:
  Sampler() : filled_(make_cache(kSpec)), q_(gaussian_queries(kSpec, kGroup, 1, 5)) {
    for (int head = 0; head < kSpec.num_kv_heads * kGroup; ++head) {
      std::vector<double> logits;
      for (int t = 0; t < kSpec.encoded[0]; ++t) {
        double dot = 0.0;
        for (int d = 0; d < kDim; ++d) {
          dot += double{sikv_load(q_.data(), kSpec.dtype, head * kDim + d)} *
                 double{filled_.k.at(0, t, head / kGroup, d)};
        }
        logits.push_back(dot / std::sqrt(kDim));
      }
      // Means of up to 8 put all logits far from zero.
      const double highest = *std::max_element(logits.begin(), logits.end());
      for (double& logit : logits) logit -= highest;
      logits_.push_back(logits);
    }
  }

  // weight(head, slot) of each token.
  template <typename Weight>
  Sums sums(Weight&& weight) const {
    Sums sums;
    for (int head = 0; head < std::ssize(logits_); ++head) {
      std::vector<double> sum(kDim + 1);
      for (int t = 0; t < kSpec.encoded[0]; ++t) {
        const double w = weight(head, t);
        if (w == 0.0) continue;
        const double e = w * std::exp(logits_[static_cast<size_t>(head)][static_cast<size_t>(t)]);
        for (int d = 0; d < kDim; ++d) {
          sum[static_cast<size_t>(d)] += e * double{filled_.v.at(0, t, head / kGroup, d)};
        }
        sum[kDim] += e;
      }
      sums.push_back(sum);
    }
    return sums;
  }

  // What one draw of hyperplanes estimates, with its weights or as if all were 1.
  Sums sample(uint64_t seed, bool weighted) const {
    SelectorSession session(magicpig(), few_tables(seed), filled_, kGroup);
    session.observe_everything();
    const std::vector<Slots> rows = session.select(0, q_);
    return sums([&](int head, int slot) {
      const Slots& slots = rows[static_cast<size_t>(head / kGroup)];
      const auto at = std::lower_bound(slots.begin(), slots.end(), slot);
      if (at == slots.end() || *at != slot) return 0.0;
      const auto place = static_cast<size_t>(head * session.capacity() + (at - slots.begin()));
      const double weight = std::exp(double{session.log_weights()[place]});
      return weighted ? weight : static_cast<double>(weight > 0.0);
    });
  }

 private:
  FilledCache filled_;
  std::vector<uint8_t> q_;
  std::vector<std::vector<double>> logits_;  // [Hq][tokens], the highest of a head 0
};

// Means over `seeds` draws in deviations of the mean from what is exact, with the sign taken off;
// and the deviations relative to the exact denominators.
struct Bias {
  double largest = 0.0, denominator = 1e300, relative_error = 0.0;
};
Bias bias(const Sampler& sampler, int seeds, bool weighted) {
  const Sums exact = sampler.sums([](int, int) { return 1.0; });
  Sums sum(exact.size(), std::vector<double>(kDim + 1)), squares = sum;
  for (int seed = 0; seed < seeds; ++seed) {
    const Sums draw = sampler.sample(static_cast<uint64_t>(seed), weighted);
    for (size_t h = 0; h < sum.size(); ++h) {
      for (size_t d = 0; d < sum[h].size(); ++d) {
        sum[h][d] += draw[h][d];
        squares[h][d] += draw[h][d] * draw[h][d];
      }
    }
  }
  Bias bias;
  for (size_t h = 0; h < sum.size(); ++h) {
    for (size_t d = 0; d < sum[h].size(); ++d) {
      const double mean = sum[h][d] / seeds;
      const double deviation = std::sqrt((squares[h][d] / seeds - mean * mean) / (seeds - 1.0));
      const double off = std::abs(mean - exact[h][d]) / deviation;
      bias.largest = std::max(bias.largest, off);
      if (d != kDim) continue;
      bias.denominator = std::min(bias.denominator, off);
      bias.relative_error = std::max(bias.relative_error, deviation / exact[h][d]);
    }
  }
  return bias;
}

// Over draws of hyperplanes, numerator (every channel) and denominator come out right on average;
// that is not so for the attention output, their ratio. Of 260 means of 600 draws the furthest lies
// about three deviations off. Without weights every denominator is far too small.
TEST(MagicPigTest, UnnormalisedNumeratorAndDenominatorAreUnbiased) {
  constexpr int kSeeds = 600;
  const Sampler sampler;
  const Bias weighted = bias(sampler, kSeeds, true), plain = bias(sampler, kSeeds, false);
  EXPECT_LT(weighted.largest, 4.5);
  EXPECT_LT(weighted.relative_error, 0.03);
  EXPECT_GT(plain.denominator, 20.0);
}

// The probability against counting: angles in a plane, fresh hyperplanes each time.
TEST(MagicPigTest, SamplingProbabilityIsThatOfTwoSharedBuckets) {
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  constexpr int kBits = 3, kTables = 8, kDraws = 20000;
  for (const double angle : {0.2, 0.9, 1.6, 2.5}) {
    int sampled = 0;
    for (int i = 0; i < kDraws; ++i) {
      int shared = 0;
      for (int l = 0; l < kTables; ++l) {
        bool same = true;
        for (int k = 0; k < kBits; ++k) {
          const double x = normal(random), y = normal(random);
          same &= (x >= 0) == (x * std::cos(angle) + y * std::sin(angle) >= 0);
        }
        shared += same;
      }
      sampled += shared >= 2;
    }
    const double u = magicpig::sampling_probability(angle, kBits, kTables);
    EXPECT_NEAR(static_cast<double>(sampled) / kDraws, u,
                5 * std::sqrt(u * (1 - u) / kDraws) + 1e-4);
  }
  EXPECT_EQ(magicpig::sampling_probability(0.0, 10, 150), 1.0);
  EXPECT_NEAR(magicpig::sampling_probability(std::numbers::pi, 10, 150), 0.0, 1e-12);
  // C(150, 2) p^2 where p is small: p = 2^-20.
  const double p = 0x1p-20, u = magicpig::sampling_probability(std::numbers::pi / 2, 20, 150);
  EXPECT_NEAR(u / (150 * 149 / 2 * p * p), 1.0, 1e-3);
}

// The kernel's log-sum-exp is the log of the estimated denominator.
TEST(MagicPigTest, GatherAttentionAppliesTheWeights) {
  const FilledCache filled = make_cache(kSpec);
  const std::vector<uint8_t> q = gaussian_queries(kSpec, kGroup, 1, 5);
  SelectorSession session(magicpig(), few_tables(3), filled, kGroup);
  session.observe_everything();
  const std::vector<Slots> rows = session.select(0, q);
  const int heads = kSpec.num_kv_heads * kGroup;
  std::vector<int32_t> slots(rows.size() * static_cast<size_t>(session.capacity())), counts;
  for (size_t row = 0; row < rows.size(); ++row) {
    std::copy(rows[row].begin(), rows[row].end(),
              slots.begin() + static_cast<ptrdiff_t>(row) * session.capacity());
    counts.push_back(static_cast<int32_t>(rows[row].size()));
  }
  auto kernel = make_instance<KernelInstance>(find_variant(SIKV_KERNEL, "gather_attention", "ref"),
                                              {}, tight_shape(kSpec, kGroup));
  ASSERT_TRUE(kernel.weighs());
  std::vector<uint8_t> workspace(kernel.plan(session.capacity()));
  std::vector<float> out(static_cast<size_t>(heads * kDim)), lse(static_cast<size_t>(heads));
  const float scale = 1.0f / std::sqrt(static_cast<float>(kDim));
  kernel.run({sizeof(sikv_attend_args),
              heads,
              &filled.cache.view(),
              q.data(),
              scale,
              0,
              {slots.data(), counts.data(), session.capacity(), 0},
              out.data(),
              lse.data(),
              session.log_weights().data()},
             workspace.data(), nullptr);
  for (int head = 0; head < heads; ++head) {
    const Slots& row = rows[static_cast<size_t>(head / kGroup)];
    double sum = 0.0;
    for (size_t i = 0; i < row.size(); ++i) {
      double dot = 0.0;
      for (int d = 0; d < kDim; ++d) {
        dot += double{sikv_load(q.data(), kSpec.dtype, head * kDim + d)} *
               double{filled.k.at(0, row[i], head / kGroup, d)};
      }
      const auto place = static_cast<size_t>(head * session.capacity()) + i;
      sum += std::exp(scale * dot + session.log_weights()[place]);
    }
    EXPECT_NEAR(lse[static_cast<size_t>(head)], std::log(sum), 1e-4);
  }
}

// Sampled: tokens at small angles always, others by chance; a head of the group may have none of
// what another has sampled.
TEST(MagicPigTest, HeadsHaveWeightsOfTheirOwn) {
  const FilledCache filled = make_cache(kSpec);
  SelectorSession session(magicpig(), few_tables(1), filled, kGroup);
  session.observe_everything();
  const std::vector<Slots> rows = session.select(0);
  int only_one = 0, both = 0;
  for (size_t i = 0; i < rows[0].size(); ++i) {
    const auto weight = [&](int head) {
      return session.log_weights()[static_cast<size_t>(head * session.capacity()) + i];
    };
    const bool first = std::isfinite(weight(0)), second = std::isfinite(weight(1));
    EXPECT_TRUE(first || second);
    EXPECT_GE(std::max(weight(0), weight(1)), 0.0f);  // a probability is at most 1
    (first && second ? both : only_one) += 1;
  }
  EXPECT_GT(only_one, 0);
  EXPECT_GT(both, 0);
}

TEST(MagicPigTest, RefusesTablesThatTakeTooMuch) {
  const sikv_shape shape = tight_shape(kSpec, kGroup);
  EXPECT_NO_THROW(make_selector(magicpig(), {{"bits", "12"}, {"tables", "1024"}}, shape, cpu()));
  try {
    make_selector(magicpig(), {{"bits", "16"}, {"tables", "150"}}, shape, cpu());
    FAIL() << "made";
  } catch (const Error& error) {
    EXPECT_STREQ(
        error.what(),
        "selector 'magicpig' (ref): the empty tables of each layer and KV head would take "
        "37 MiB with bits 16 and tables 150, and at most 16 MiB are allowed: lower either");
  }
}

}  // namespace
}  // namespace sikv::testing
