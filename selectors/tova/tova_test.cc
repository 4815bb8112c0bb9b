#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/support/evictions.h"
#include "tests/support/replay.h"

namespace sikv::testing {
namespace {

// `pages` cut to the `budget` that the query of `token` attends to most among them and `tail`, in the
// mean over all query heads; in fp64, without the plugin's code.
std::vector<int32_t> best(const Replay& replay, int token, const std::vector<int32_t>& pages,
                          const std::vector<int32_t>& tail, int budget) {
  std::vector<int32_t> seen = pages;
  seen.insert(seen.end(), tail.begin(), tail.end());
  std::vector<double> scores(static_cast<size_t>(replay.prompt + replay.steps), 0.0);
  for (int head = 0; head < Replay::kHeads * Replay::kGroup; ++head) {
    std::vector<double> e;
    for (const int32_t t : seen) {
      const float *q = replay.query(token, head), *k = replay.key(t, head / Replay::kGroup);
      double dot = 0.0;
      for (int d = 0; d < Replay::kDim; ++d) dot += double{q[d]} * k[d];
      e.push_back(std::exp(dot / std::sqrt(Replay::kDim)));
    }
    const double total = std::accumulate(e.begin(), e.end(), 0.0);
    for (size_t i = 0; i < seen.size(); ++i) scores[static_cast<size_t>(seen[i])] += e[i] / total;
  }
  std::vector<int32_t> kept = pages;
  std::stable_sort(kept.begin(), kept.end(), [&](int32_t a, int32_t b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  kept.resize(std::min(kept.size(), static_cast<size_t>(budget)));
  std::sort(kept.begin(), kept.end());
  return kept;
}

std::vector<int32_t> range(int first, int end) {
  std::vector<int32_t> numbers(static_cast<size_t>(end - first));
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

TEST(TovaTest, KeepsWhatTheLastQueryOfAllHeadsAttendsTo) {
  const Replay prompt_only(600, 1, 1), replay(600, 300, 1);
  for (const char* variant : {"ref", "cpu"}) {
    const std::string selector = std::string("tova[") + variant + "](budget=70,pinned=0)";
    const auto after_prompt = best(prompt_only, 599, range(0, 512), range(512, 600), 70);
    for (const auto& positions : prompt_only.run(selector, 1).positions) {
      EXPECT_EQ(positions, after_prompt) << variant;
    }
    // The page of 512 .. 767 is encoded when token 768 comes.
    std::vector<int32_t> kept = best(replay, 599, range(0, 512), range(512, 600), 70);
    const auto page = range(512, 768);
    kept.insert(kept.end(), page.begin(), page.end());
    for (const auto& positions : replay.run(selector, 1).positions) {
      EXPECT_EQ(positions, best(replay, 767, kept, {}, 70)) << variant;
    }
  }
}

TEST(TovaTest, UnlimitedBudgetEqualsFullAttention) {
  const Replay replay(600, 300, 2);
  EXPECT_EQ(replay.run("tova(budget=900,pinned=0)", 1).out, replay.run("full(pinned=0)", 1).out);
}

TEST(TovaTest, CountsPinnedTokensOnTop) {
  expect_exact_budgets(find_variant(SIKV_SELECTOR, "tova"));
}

}  // namespace
}  // namespace sikv::testing
