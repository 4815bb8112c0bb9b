#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/support/evictions.h"
#include "tests/support/replay.h"

namespace sikv::testing {
namespace {

// The definition in fp64, without the plugin's code: positions that one KV head has in pages after
// all steps.
std::vector<int32_t> heavy_hitters(const Replay& replay, int head, int budget, int recent) {
  std::vector<double> scores(static_cast<size_t>(replay.prompt + replay.steps), 0.0);
  const auto attend = [&](int token, const std::vector<int32_t>& seen) {
    for (int g = 0; g < Replay::kGroup; ++g) {
      std::vector<double> e;
      double total = 0.0;
      for (const int32_t t : seen) {
        const float *q = replay.query(token, head * Replay::kGroup + g), *k = replay.key(t, head);
        double dot = 0.0;
        for (int d = 0; d < Replay::kDim; ++d) dot += double{q[d]} * k[d];
        e.push_back(std::exp(dot / std::sqrt(Replay::kDim)));
        total += e.back();
      }
      for (size_t i = 0; i < seen.size(); ++i) {
        scores[static_cast<size_t>(seen[i])] += e[i] / total / Replay::kGroup;
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

TEST(H2oTest, CountsPinnedTokensOnTop) {
  const CacheSpec spec{
      .num_kv_heads = 2, .head_dim = 64, .encoded = {512, 256}, .tail = {2, 90}, .pinned = 9};
  const sikv_shape shape = tight_shape(spec, 3);
  const FilledCache filled(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                           make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
  for (const int budget : {0, 1, 100, 247, 600}) {
    const auto kept = kept_after_prompt(find_variant(SIKV_SELECTOR, "h2o"),
                                        {{"budget", std::to_string(budget)}}, filled, 3);
    for (int row = 0; row < filled.cache.num_rows(); ++row) {
      EXPECT_EQ(kept[static_cast<size_t>(row)].size(),
                std::min(candidates(filled.cache, row).size(), static_cast<size_t>(budget)));
    }
  }
}

}  // namespace
}  // namespace sikv::testing
