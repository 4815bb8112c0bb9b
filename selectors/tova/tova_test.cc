#include <gtest/gtest.h>

#include <algorithm>

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
  for (int head = 0; head < replay.query_heads(); ++head) {
    const auto p = replay.attention(replay.query(token, head), head / replay.group, seen);
    for (size_t i = 0; i < seen.size(); ++i) scores[static_cast<size_t>(seen[i])] += p[i];
  }
  std::vector<int32_t> kept = pages;
  std::stable_sort(kept.begin(), kept.end(), [&](int32_t a, int32_t b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  kept.resize(std::min(kept.size(), static_cast<size_t>(budget)));
  std::sort(kept.begin(), kept.end());
  return kept;
}

TEST(TovaTest, KeepsWhatTheLastQueryOfAllHeadsAttendsTo) {
  const Replay prompt_only(600, 1, 1), replay(600, 300, 1);
  for (const char* variant : {"ref", "cpu"}) {
    const std::string selector = std::string("tova[") + variant + "](budget=70,pinned=0)";
    const auto after_prompt =
        best(prompt_only, 599, token_range(0, 512), token_range(512, 600), 70);
    for (const auto& positions : prompt_only.run(selector, 1).positions) {
      EXPECT_EQ(positions, after_prompt) << variant;
    }
    // The page of 512 .. 767 is encoded when token 768 comes.
    std::vector<int32_t> kept = best(replay, 599, token_range(0, 512), token_range(512, 600), 70);
    const auto page = token_range(512, 768);
    kept.insert(kept.end(), page.begin(), page.end());
    for (const auto& positions : replay.run(selector, 1).positions) {
      EXPECT_EQ(positions, best(replay, 767, kept, {}, 70)) << variant;
    }
  }
}

// Logits come 16 heads at a time: exactly that many, and a rest.
TEST(TovaTest, TakesManyQueryHeads) {
  for (const int group : {16, 20}) {
    const Replay replay(300, 1, 3, 1, 0, group);
    const auto want = best(replay, 299, token_range(0, 256), token_range(256, 300), 70);
    for (const char* variant : {"ref", "cpu"}) {
      const std::string selector = std::string("tova[") + variant + "](budget=70,pinned=0)";
      for (const auto& positions : replay.run(selector, 1).positions) {
        EXPECT_EQ(positions, want) << variant << ", G " << group;
      }
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

TEST(TovaTest, SequencesOfABatchDoNotMix) {
  for (const char* variant : {"ref", "cpu"}) {
    const std::string tova = std::string("tova[") + variant + "](budget=90";
    expect_batch_equals_each_alone(tova + ",pinned=7)", false);
    expect_batch_equals_each_alone("adakv(base=" + tova + "),pinned=7)", false);
  }
}

TEST(TovaTest, RemembersOnlyWhatItHolds) {
  expect_state_of_held_tokens("tova(budget=90,pinned=7)", 90, 7, 1);
}

}  // namespace
}  // namespace sikv::testing
