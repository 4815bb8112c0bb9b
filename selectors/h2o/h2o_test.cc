#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "tests/support/evictions.h"
#include "tests/support/replay.h"

namespace sikv::testing {
namespace {

// The definition in fp64, without the plugin's code: positions that one KV head has in pages after
// all steps.
std::vector<int32_t> heavy_hitters(const Replay& replay, int head, int budget, int recent) {
  std::vector<double> scores(static_cast<size_t>(replay.prompt + replay.steps), 0.0);
  const auto attend = [&](int token, const std::vector<int32_t>& seen) {
    for (int g = 0; g < replay.group; ++g) {
      const auto p = replay.attention(replay.query(token, head * replay.group + g), head, seen);
      for (size_t i = 0; i < seen.size(); ++i) {
        scores[static_cast<size_t>(seen[i])] += p[i] / replay.group;
      }
    }
  };
  std::vector<int32_t> pages, tail;
  const auto evict = [&](int length) {
    std::vector<int32_t> kept, others;
    for (const int32_t t : pages) (t >= length - recent ? kept : others).push_back(t);
    std::stable_sort(others.begin(), others.end(), [&](int32_t a, int32_t b) {
      return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
    });
    const auto room = std::max<int64_t>(budget - std::ssize(kept), 0);
    others.resize(static_cast<size_t>(std::min<int64_t>(room, std::ssize(others))));
    kept.insert(kept.end(), others.begin(), others.end());
    std::sort(kept.begin(), kept.end());
    pages = kept;
  };
  std::vector<int32_t> seen;
  for (int t = 0; t < replay.prompt; ++t) {
    seen.push_back(t);
    attend(t, seen);
  }
  const int whole = replay.prompt / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
  pages.assign(seen.begin(), seen.begin() + whole);
  tail.assign(seen.begin() + whole, seen.end());
  evict(replay.prompt);
  for (int s = 0; s < replay.steps; ++s) {
    const int token = replay.prompt + s;
    if (std::ssize(tail) == SIKV_PAGE_TOKENS) {
      pages.insert(pages.end(), tail.begin(), tail.end());
      tail.clear();
      evict(token);
    }
    tail.push_back(token);
    seen = pages;
    seen.insert(seen.end(), tail.begin(), tail.end());
    attend(token, seen);
  }
  return pages;
}

TEST(H2oTest, KeepsTheHeaviestAndTheNewest) {
  const Replay replay(600, 450, 1);  // two pages at once, and two more while text is generated
  for (const auto& [share, recent] : {std::pair{"0", 0}, {"0.5", 45}, {"1", 90}}) {
    for (const char* variant : {"ref", "cpu"}) {
      const auto result =
          replay.run(std::string("h2o[") + variant + "](budget=90,recent=" + share + ",pinned=0)",
                     replay.prompt);
      for (int h = 0; h < Replay::kHeads; ++h) {
        EXPECT_EQ(result.positions[static_cast<size_t>(h)], heavy_hitters(replay, h, 90, recent))
            << share << " " << variant << ", head " << h;
      }
    }
  }
}

TEST(H2oTest, TakesSixteenQueryHeads) {
  const Replay replay(300, 220, 5, 1, 0, 16);  // a page at once and one while text is generated
  for (const char* variant : {"ref", "cpu"}) {
    const auto result = replay.run(
        std::string("h2o[") + variant + "](budget=60,recent=0.5,pinned=0)", replay.prompt);
    for (int h = 0; h < Replay::kHeads; ++h) {
      EXPECT_EQ(result.positions[static_cast<size_t>(h)], heavy_hitters(replay, h, 60, 30))
          << variant << ", head " << h;
    }
  }
}

TEST(H2oTest, UnlimitedBudgetEqualsFullAttention) {
  const Replay replay(600, 300, 2);
  EXPECT_EQ(replay.run("h2o(budget=900,pinned=0)", replay.prompt).out,
            replay.run("full(pinned=0)", 1).out);
  EXPECT_NE(replay.run("h2o(budget=300,pinned=0)", replay.prompt).out,
            replay.run("full(pinned=0)", 1).out);
}

TEST(H2oTest, AFractionIsOneOfThePrompt) {
  const Replay replay(600, 450, 3);
  for (const auto& positions : replay.run("h2o(budget=0.1,pinned=0)", replay.prompt).positions) {
    EXPECT_EQ(positions.size(), 60u);
  }
}

TEST(H2oTest, CountsPinnedTokensOnTop) { expect_exact_budgets(find_variant(SIKV_SELECTOR, "h2o")); }

// Of a batch only sequences that got a page are cut again.
TEST(H2oTest, LeavesSequencesWithoutANewPage) {
  constexpr int kGroup = 3;
  const CacheSpec spec{
      .num_kv_heads = 2, .head_dim = 64, .encoded = {512, 512}, .tail = {2, 90}, .pinned = 0};
  const sikv_shape shape = tight_shape(spec, kGroup);
  const FilledCache filled(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                           make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
  SelectorSession session(find_variant(SIKV_SELECTOR, "h2o"), {{"budget", "70"}}, filled, kGroup);
  session.observe_everything();
  for (const Slots& row : evictions(session.selector(), filled.cache)) EXPECT_EQ(row.size(), 70u);
  session.observe_page({-1, 256});
  const auto rows = evictions(session.selector(), filled.cache);
  for (const size_t row : {0, 1}) EXPECT_EQ(rows[row], Slots{SIKV_SELECT_ALL});
  for (const size_t row : {2, 3}) EXPECT_EQ(rows[row].size(), 70u);
}

// Heads of different lengths, cut again at every page: what adakv splits stays the sum of both budgets.
TEST(H2oTest, AdaKvAroundItKeepsItsTotal) {
  Replay replay(1100, 700, 4);
  // The queries of head 0 look at its first three tokens alone, those of head 1 at all alike.
  for (int t = 0; t < replay.prompt + replay.steps; ++t) {
    std::fill_n(replay.q.data() + t * replay.query_heads() * Replay::kDim,
                replay.group * Replay::kDim, 1.0f);
    if (t < 3) std::fill_n(replay.k.data() + t * Replay::kHeads * Replay::kDim, Replay::kDim, 2.0f);
  }
  const auto kept =
      replay.run("adakv(alpha=0.2,base=h2o(budget=600,recent=0.1),pinned=0)", replay.prompt)
          .positions;
  EXPECT_EQ(kept[0].size() + kept[1].size(), 1200u);
  EXPECT_GT(std::max(kept[0].size(), kept[1].size()), 700u);  // and they do differ
}

TEST(H2oTest, SequencesOfABatchDoNotMix) {
  for (const char* variant : {"ref", "cpu"}) {
    const std::string h2o = std::string("h2o[") + variant + "](budget=90,recent=0.3";
    expect_batch_equals_each_alone(h2o + ",pinned=7)", true);
    expect_batch_equals_each_alone("adakv(base=" + h2o + "),pinned=7)", true);
  }
}

TEST(H2oTest, RemembersOnlyWhatItHolds) {
  expect_state_of_held_tokens("h2o(budget=90,pinned=7)", 90, 7, 600);
}

}  // namespace
}  // namespace sikv::testing
