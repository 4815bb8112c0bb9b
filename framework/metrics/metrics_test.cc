#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "framework/metrics/attention_metrics.h"
#include "framework/metrics/summary.h"

namespace sikv {
namespace {

struct Problem {
  int group = 3, head_dim = 8;
  int64_t n = 50;
  std::vector<float> q, k, v;

  explicit Problem(uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (auto* data : {&q, &k, &v}) {
      data->resize(static_cast<size_t>((data == &q ? group : n) * head_dim));
      for (float& x : *data) x = normal(random);
    }
  }
  ExactAttention exact() const {
    return exact_attention(q.data(), k.data(), v.data(), group, head_dim, n, 0.5);
  }
};

TEST(ExactAttention, ProbabilitiesSumToOneAndAverageTheValues) {
  const Problem problem(1);
  const auto exact = problem.exact();
  for (int g = 0; g < problem.group; ++g) {
    const double* p = exact.p.data() + g * problem.n;
    EXPECT_NEAR(std::accumulate(p, p + problem.n, 0.0), 1.0, 1e-12);
  }
  // One token: the output is its value.
  const auto one =
      exact_attention(problem.q.data(), problem.k.data(), problem.v.data(), 3, 8, 1, 1);
  for (int g = 0; g < 3; ++g) {
    for (int d = 0; d < 8; ++d) EXPECT_DOUBLE_EQ(one.out[size_t(g * 8 + d)], problem.v[size_t(d)]);
  }
}

TEST(JudgeSelection, EverythingSelectedLosesNothing) {
  const Problem problem(2);
  std::vector<int32_t> all(40);
  std::iota(all.begin(), all.end(), 0);
  const auto quality = judge_selection(problem.exact(), problem.v.data(), {all, {}, 40}, 7);
  EXPECT_NEAR(quality.dropped_mass, 0.0, 1e-12);
  EXPECT_NEAR(quality.selection_error, 0.0, 1e-12);
  EXPECT_DOUBLE_EQ(*quality.recall, 1.0);
}

TEST(JudgeSelection, CountsTailAndPinnedAsKeptAndLeavesPinnedOutOfTheRecall) {
  const Problem problem(3);
  const auto exact = problem.exact();
  std::vector<double> mean(static_cast<size_t>(problem.n), 0.0);
  for (int g = 0; g < 3; ++g) {
    for (int64_t t = 0; t < problem.n; ++t) {
      mean[size_t(t)] += exact.p[size_t(g * problem.n + t)] / 3;
    }
  }
  std::vector<int32_t> order(40);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return mean[size_t(a)] > mean[size_t(b)]; });
  // The best token is pinned; the next three are the top 3; two of them are selected.
  const std::vector<int32_t> pinned = {order[0]}, selected = {order[1], order[3], order[20]};
  const auto quality = judge_selection(exact, problem.v.data(), {selected, pinned, 40}, 3);
  EXPECT_DOUBLE_EQ(*quality.recall, 2.0 / 3.0);
  double kept = mean[size_t(order[0])] + mean[size_t(order[1])] + mean[size_t(order[3])] +
                mean[size_t(order[20])];
  for (int64_t t = 40; t < 50; ++t) kept += mean[size_t(t)];
  EXPECT_NEAR(quality.dropped_mass, 1.0 - kept, 1e-12);
}

// ||o - o_S|| <= 2 delta max ||v||, per head, so also for the mean over a group's Frobenius norm.
TEST(JudgeSelection, ErrorObeysTheBoundByDroppedMass) {
  for (uint32_t seed = 10; seed < 60; ++seed) {
    Problem problem(seed);
    problem.group = 1;
    const auto exact = problem.exact();
    std::vector<int32_t> selected;
    for (int32_t t = static_cast<int32_t>(seed % 3); t < 45; t += 3) selected.push_back(t);
    const auto quality = judge_selection(exact, problem.v.data(), {selected, {}, 45}, {});
    double max_norm = 0, norm = 0;
    for (int64_t t = 0; t < problem.n; ++t) {
      double sum = 0;
      for (int d = 0; d < 8; ++d) sum += std::pow(problem.v[size_t(t * 8 + d)], 2);
      max_norm = std::max(max_norm, std::sqrt(sum));
    }
    for (double x : exact.out) norm += x * x;
    EXPECT_LE(quality.selection_error * std::sqrt(norm),
              2 * quality.dropped_mass * max_norm + 1e-12)
        << "seed " << seed;
    EXPECT_FALSE(quality.recall.has_value());
  }
}

TEST(JudgeSelection, BudgetBeyondTheContextAndBudgetZero) {
  const Problem problem(4);
  const auto exact = problem.exact();
  std::vector<int32_t> all(40);
  std::iota(all.begin(), all.end(), 0);
  EXPECT_DOUBLE_EQ(*judge_selection(exact, problem.v.data(), {all, {}, 40}, 1000).recall, 1.0);
  EXPECT_FALSE(judge_selection(exact, problem.v.data(), {{}, {}, 40}, 0).recall.has_value());
  EXPECT_DOUBLE_EQ(*judge_selection(exact, problem.v.data(), {{}, {}, 40}, 5).recall, 0.0);
}

TEST(Summary, TailsLieOnTheBadSide) {
  std::vector<double> samples(100);
  std::iota(samples.begin(), samples.end(), 1.0);
  const Summary high = summarize(samples, BadSide::kHigh);
  EXPECT_DOUBLE_EQ(high.mean, 50.5);
  EXPECT_DOUBLE_EQ(high.p95, 95);
  EXPECT_DOUBLE_EQ(high.p99, 99);
  const Summary low = summarize(samples, BadSide::kLow);
  EXPECT_DOUBLE_EQ(low.p95, 6);
  EXPECT_DOUBLE_EQ(low.p99, 2);
  EXPECT_TRUE(std::isnan(summarize({}, BadSide::kHigh).mean));
}

}  // namespace
}  // namespace sikv
