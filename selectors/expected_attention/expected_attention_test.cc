#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>

#include "framework/base/error.h"
#include "tests/support/evictions.h"
#include "tests/support/replay.h"

namespace sikv::testing {
namespace {

constexpr int kSinks = 4, kDim = Replay::kDim, kHalf = kDim / 2;
constexpr double kTheta = 10000.0;

// x turned by RoPE to `position`.
std::vector<double> rotated(const std::vector<double>& x, double position) {
  std::vector<double> out(kDim);
  for (int i = 0; i < kHalf; ++i) {
    const std::complex<double> turned =
        std::complex<double>(x[static_cast<size_t>(i)], x[static_cast<size_t>(i + kHalf)]) *
        std::polar(1.0, position * std::pow(kTheta, -double(i) / kHalf));
    out[static_cast<size_t>(i)] = turned.real();
    out[static_cast<size_t>(i + kHalf)] = turned.imag();
  }
  return out;
}

// x turned to each of the `future` positions behind a prompt, in the mean.
std::vector<double> expected_turn(const std::vector<double>& x, int prompt, int future) {
  std::vector<double> mean(kDim, 0.0);
  for (int f = 0; f < future; ++f) {
    const auto turned = rotated(x, prompt + f);
    for (size_t d = 0; d < kDim; ++d) mean[d] += turned[d] / future;
  }
  return mean;
}

TEST(ExpectedAttentionTest, KeepsSinksAndExactlyTheBudget) {
  const Replay replay(600, 1, 1);
  for (const int budget : {0, 4, 30, 511, 512, 600}) {
    const auto selector =
        "expected_attention(budget=" + std::to_string(budget) + ",sinks=4,pinned=0)";
    for (const auto& positions : replay.run(selector, replay.prompt).positions) {
      EXPECT_EQ(std::ssize(positions), std::clamp(budget, kSinks, 512));
      for (int p = 0; p < kSinks; ++p) EXPECT_EQ(positions[static_cast<size_t>(p)], p);
    }
  }
}

// Queries that before their rotation are all the same have no covariance: tokens rank by the softmax
// of that query, turned to the positions behind the prompt, times the norm of their value.
void expect_one_query_expects_itself(int group, int future, double epsilon, bool value_norm) {
  Replay replay(600, 1, 2, 1, 0, group);
  Random random(3);
  std::vector<std::vector<double>> base(static_cast<size_t>(replay.query_heads()));
  for (size_t head = 0; head < base.size(); ++head) {
    for (int d = 0; d < kDim; ++d) base[head].push_back(random.normal());
    for (int p = 0; p < replay.prompt; ++p) {
      const auto turned = rotated(base[head], p);
      std::copy(turned.begin(), turned.end(),
                replay.q.data() + (size_t(p) * base.size() + head) * kDim);
    }
  }
  const auto kept =
      replay
          .run("expected_attention(budget=60,pinned=0,future=" + std::to_string(future) +
                   ",epsilon=" + std::to_string(epsilon) +
                   ",value_norm=" + (value_norm ? "true" : "false") + ")",
               replay.prompt)
          .positions;
  const std::vector<int32_t> behind_sinks = token_range(kSinks, replay.prompt);
  for (int h = 0; h < Replay::kHeads; ++h) {
    std::vector<double> scores(512, 0.0);
    for (int g = 0; g < group; ++g) {
      const auto next =
          expected_turn(base[static_cast<size_t>(h * group + g)], replay.prompt, future);
      const auto p = replay.attention(next.data(), h, behind_sinks);
      for (int t = kSinks; t < 512; ++t) {
        scores[static_cast<size_t>(t)] += p[static_cast<size_t>(t - kSinks)] / group;
      }
    }
    for (int t = kSinks; t < 512; ++t) {
      double squares = 0.0;
      for (int d = 0; d < kDim; ++d)
        squares += double{replay.value(t, h)[d]} * replay.value(t, h)[d];
      double& score = scores[static_cast<size_t>(t)];
      score = (score + epsilon) * (value_norm ? std::sqrt(squares) : 1.0);
    }
    Slots want = {0, 1, 2, 3}, others = token_range(kSinks, 512);
    std::sort(others.begin(), others.end(), [&](int32_t a, int32_t b) {
      return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
    });
    want.insert(want.end(), others.begin(), others.begin() + 56);
    std::sort(want.begin(), want.end());
    EXPECT_EQ(kept[static_cast<size_t>(h)], want)
        << "head " << h << ", G " << group << ", future " << future << ", epsilon " << epsilon;
  }
}

TEST(ExpectedAttentionTest, OneQueryExpectsItself) {
  expect_one_query_expects_itself(2, 1, 0.0, true);
  expect_one_query_expects_itself(2, 1, 0.0, false);
  expect_one_query_expects_itself(2, 64, 0.0, true);
  expect_one_query_expects_itself(2, 64, 0.002, true);
  expect_one_query_expects_itself(16, 64, 0.002, true);
}

// The closed form against the mean it stands for: exp(q.k / sqrt(D)) over draws of the future
// queries: 20000 normal ones, turned to where the next ones are in the mean.
TEST(ExpectedAttentionTest, IsTheExpectationOverNormalQueries) {
  Replay replay(600, 1, 4);
  const int heads = replay.query_heads();
  Random random(5);
  std::vector<double> mean(kDim), spread(kDim);
  for (int d = 0; d < kDim; ++d)
    mean[size_t(d)] = random.normal(), spread[size_t(d)] = 1.5 * random.uniform();
  std::vector<std::vector<double>> draws;
  for (int p = 0; p < replay.prompt; ++p) {
    std::vector<double> q(kDim);
    for (int d = 0; d < kDim; ++d)
      q[size_t(d)] = mean[size_t(d)] + spread[size_t(d)] * random.normal();
    const auto turned = rotated(q, p);
    for (int head = 0; head < heads; ++head) {
      std::copy(turned.begin(), turned.end(), replay.q.data() + (size_t(p * heads + head)) * kDim);
    }
    draws.push_back(q);
  }
  // A normal distribution with the moments of the prompt's own queries.
  std::vector<double> sample_mean(kDim, 0.0);
  const double n = replay.prompt - kSinks;
  for (int p = kSinks; p < replay.prompt; ++p) {
    for (int d = 0; d < kDim; ++d) sample_mean[size_t(d)] += draws[size_t(p)][size_t(d)] / n;
  }
  for (const int future : {1, 64}) {
    std::vector<double> expected(512, 0.0);
    for (int draw = 0; draw < 20000; ++draw) {
      // mean + sum of centred queries times normal weights / sqrt(n) has their covariance.
      std::vector<double> q = sample_mean;
      for (int p = kSinks; p < replay.prompt; p += 1) {
        const double weight = random.normal() / std::sqrt(n);
        for (int d = 0; d < kDim; ++d) {
          q[size_t(d)] += weight * (draws[size_t(p)][size_t(d)] - sample_mean[size_t(d)]);
        }
      }
      const auto next = expected_turn(q, replay.prompt, future);
      for (int t = 0; t < 512; ++t) {
        double dot = 0.0;
        for (int d = 0; d < kDim; ++d) dot += next[size_t(d)] * replay.key(t, 0)[d];
        expected[size_t(t)] += std::exp(dot / std::sqrt(kDim));
      }
    }
    Slots others;
    for (int t = kSinks; t < 512; ++t) others.push_back(t);
    std::sort(others.begin(), others.end(),
              [&](int32_t a, int32_t b) { return expected[size_t(a)] > expected[size_t(b)]; });
    Slots want(others.begin(), others.begin() + 96), common;
    std::sort(want.begin(), want.end());
    const auto kept = replay
                          .run("expected_attention(budget=100,pinned=0,value_norm=false,future=" +
                                   std::to_string(future) + ")",
                               replay.prompt)
                          .positions[0];
    std::set_intersection(want.begin(), want.end(), kept.begin(), kept.end(),
                          std::back_inserter(common));
    EXPECT_GE(common.size(), 94u) << future;  // of 96: draws leave some noise at the cut
  }
}

TEST(ExpectedAttentionTest, RefusesToUndoAnUnknownRotation) {
  sikv_shape shape = make_shape(64, SIKV_FP32);
  shape.rope_theta = 0;
  const Variant& variant = find_variant(SIKV_SELECTOR, "expected_attention");
  make_selector(variant, {{"rope", "kept"}}, shape, cpu());
  try {
    make_selector(variant, {}, shape, cpu());
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("choose `rope: kept`"), std::string::npos)
        << error.what();
  }
}

// Channels of a model that turns neighbours, in the order of one that turns halves: the same choice.
TEST(ExpectedAttentionTest, InterleavedIsHalfInAnotherOrder) {
  const Replay half(600, 1, 7);
  Replay interleaved = half;
  for (auto member : {&Replay::k, &Replay::q}) {
    for (size_t first = 0; first < (half.*member).size(); first += kDim) {
      for (size_t i = 0; i < kHalf; ++i) {
        (interleaved.*member)[first + 2 * i] = (half.*member)[first + i];
        (interleaved.*member)[first + 2 * i + 1] = (half.*member)[first + i + kHalf];
      }
    }
  }
  const std::string selector = "expected_attention(budget=60,pinned=0,rope=";
  EXPECT_EQ(interleaved.run(selector + "interleaved)", half.prompt).positions,
            half.run(selector + "half)", half.prompt).positions);
  EXPECT_NE(half.run(selector + "kept)", half.prompt).positions,
            half.run(selector + "half)", half.prompt).positions);
}

TEST(ExpectedAttentionTest, UnlimitedBudgetEqualsFullAttention) {
  const Replay replay(600, 20, 6);
  EXPECT_EQ(replay.run("expected_attention(budget=900,pinned=0)", replay.prompt).out,
            replay.run("full(pinned=0)", 1).out);
}

TEST(ExpectedAttentionTest, SequencesOfABatchDoNotMix) {
  const std::string selector = "expected_attention(budget=90";
  expect_batch_equals_each_alone(selector + ",pinned=7)", true);
  expect_batch_equals_each_alone("adakv(base=" + selector + "),pinned=7)", true);
}

}  // namespace
}  // namespace sikv::testing
