#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "tests/support/replay.h"

namespace sikv::testing {
namespace {

constexpr int kPrompt = 600, kEncoded = 512, kWindow = 100, kPrefix = kPrompt - kWindow;
constexpr int kInWindow = kEncoded - kPrefix;  // of the window, what lies in pages
constexpr int kHidden = 80;

// Attention of the prompt's query `token` in one query head, over the tokens before it.
std::vector<double> attention(const Replay& replay, int layer, int head, int token) {
  return replay.attention(replay.query(token, head, layer), head / replay.group,
                          token_range(0, token + 1), layer);
}

std::vector<double> projected(const Replay& replay, int layer, int head, int token) {
  std::vector<double> out(static_cast<size_t>(replay.hidden), 0.0);
  const float *v = replay.value(token, head / replay.group, layer),
              *w = replay.projection(head, layer);
  for (int d = 0; d < Replay::kDim; ++d) {
    for (int i = 0; i < replay.hidden; ++i) {
      out[static_cast<size_t>(i)] += double{v[d]} * w[d * replay.hidden + i];
    }
  }
  return out;
}

double norm(const std::vector<double>& x) {
  return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
}

// The definition in fp64, without the plugin's code: scores [layer][head][prefix], each layer's sum 1.
using Scores = std::vector<std::vector<std::vector<double>>>;
Scores scores_of(const Replay& replay, bool of_attention, int kernel) {
  Scores scores;
  for (int l = 0; l < replay.layers; ++l) {
    auto& layer = scores.emplace_back();
    double sum = 0;
    for (int h = 0; h < Replay::kHeads; ++h) {
      std::vector<double> raw(kPrefix, 0.0);
      std::vector<std::vector<double>> squares(static_cast<size_t>(replay.group),
                                               std::vector<double>(kPrefix, 0.0));
      for (int i = kPrefix; i < kPrompt; ++i) {
        std::vector<double> mean(kPrefix, 0.0);
        for (int g = 0; g < replay.group; ++g) {
          const auto a = attention(replay, l, h * replay.group + g, i);
          for (size_t t = 0; t < kPrefix; ++t) {
            mean[t] += a[t] / replay.group;
            if (!of_attention) squares[size_t(g)][t] += a[t] * a[t];
          }
        }
        if (!of_attention) continue;
        for (auto& of_head : squares) {
          for (size_t t = 0; t < kPrefix; ++t) of_head[t] += mean[t] * mean[t];
        }
      }
      for (int g = 0; g < replay.group; ++g) {
        for (int t = 0; t < kPrefix; ++t) {
          raw[size_t(t)] += std::sqrt(squares[size_t(g)][size_t(t)]) *
                            norm(projected(replay, l, h * replay.group + g, t)) / replay.group;
        }
      }
      auto& pooled = layer.emplace_back(kPrefix, 0.0);
      for (int t = 0; t < kPrefix; ++t) {
        for (int at = std::max(t - kernel / 2, 0); at <= std::min(t + kernel / 2, kPrefix - 1);
             ++at) {
          pooled[size_t(t)] += raw[size_t(at)] / kernel;
        }
        sum += pooled[size_t(t)];
      }
    }
    for (auto& head : layer) {
      for (double& score : head) score /= sum;
    }
  }
  return scores;
}

// What is kept by brute force over all layers and heads: positions by (layer, head), window included.
std::vector<std::vector<int32_t>> best_of_all(const Scores& scores, int total) {
  std::vector<std::tuple<double, int, int, int>> all;
  std::vector<std::vector<int32_t>> kept;
  for (size_t l = 0; l < scores.size(); ++l) {
    for (size_t h = 0; h < scores[l].size(); ++h) {
      for (int t = 0; t < kPrefix; ++t) {
        all.emplace_back(-scores[l][h][size_t(t)], int(l), int(h), t);
      }
    }
  }
  kept.resize(scores.size() * Replay::kHeads);
  std::sort(all.begin(), all.end());
  for (int i = 0; i < total; ++i) {
    const auto [score, l, h, t] = all[size_t(i)];
    kept[size_t(l * Replay::kHeads + h)].push_back(t);
  }
  for (auto& row : kept) {
    for (int t = kPrefix; t < kEncoded; ++t) row.push_back(t);
    std::sort(row.begin(), row.end());
  }
  return kept;
}

std::string laprox(const char* variant, int budget, const std::string& more) {
  return std::string("laprox[") + variant + "](budget=" + std::to_string(budget) +
         ",window=100,pinned=0" + more + ")";
}

TEST(LaProxTest, KeepsTheBestOfAllLayersAndHeads) {
  const Replay replay(kPrompt, 1, 1, 3, kHidden);
  for (const auto& [options, of_attention, kernel] :
       {std::tuple(",kernel_size=7", true, 7),
        std::tuple(",kernel_size=1,group=score", false, 1)}) {
    const Scores scores = scores_of(replay, of_attention, kernel);
    const auto want = best_of_all(scores, 3 * Replay::kHeads * (112 - kInWindow));
    for (const char* variant : {"ref", "cpu"}) {
      EXPECT_EQ(replay.run(laprox(variant, 112, options), kPrompt).positions, want)
          << variant << options;
    }
    // Not what each head would have kept for itself.
    EXPECT_TRUE(
        std::any_of(want.begin(), want.end(), [](const auto& row) { return row.size() != 112; }));
  }
}

// Logits come 16 heads at a time: exactly that many, and a rest.
TEST(LaProxTest, TakesManyQueryHeads) {
  for (const int group : {16, 20}) {
    const Replay replay(kPrompt, 1, 7, 1, kHidden, group);
    const auto want = best_of_all(scores_of(replay, true, 7), Replay::kHeads * (112 - kInWindow));
    for (const char* variant : {"ref", "cpu"}) {
      EXPECT_EQ(replay.run(laprox(variant, 112, ",kernel_size=7"), kPrompt).positions, want)
          << variant << ", G " << group;
    }
  }
}

TEST(LaProxTest, KeepsExactlyTheTotal) {
  const Replay replay(kPrompt, 1, 2, 3, kHidden);
  for (const int budget : {0, kInWindow, kInWindow + 1, 100, 300, 511, 512, 1000}) {
    int64_t total = 0;
    for (const auto& row : replay.run(laprox("cpu", budget, ""), kPrompt).positions) {
      total += std::ssize(row);
    }
    EXPECT_EQ(total, 3 * Replay::kHeads * std::clamp(budget, kInWindow, kEncoded)) << budget;
  }
}

TEST(LaProxTest, OneLayerAndEqualHeadsGiveTheBestOfEach) {
  // Both KV heads are the same: each keeps its budget.
  Replay replay(kPrompt, 1, 3, 1, kHidden);
  for (int t = 0; t < kPrompt + 1; ++t) {
    std::copy_n(replay.key(t, 0), Replay::kDim, replay.k.data() + (t * 2 + 1) * Replay::kDim);
    std::copy_n(replay.value(t, 0), Replay::kDim, replay.v.data() + (t * 2 + 1) * Replay::kDim);
    std::copy_n(replay.query(t, 0), 2 * Replay::kDim, replay.q.data() + (t * 4 + 2) * Replay::kDim);
  }
  std::copy_n(replay.projection(0, 0), 2 * Replay::kDim * kHidden,
              replay.w_o.data() + 2 * Replay::kDim * kHidden);
  const auto kept = replay.run(laprox("ref", 60, ",kernel_size=1"), kPrompt).positions;
  EXPECT_EQ(kept[0], kept[1]);
  EXPECT_EQ(kept[0].size(), 60u);
}

TEST(LaProxTest, SharedHeadsKeepOneSet) {
  const Replay replay(kPrompt, 1, 4, 3, kHidden);
  const auto kept = replay.run(laprox("cpu", 112, ",share_heads=true"), kPrompt).positions;
  int64_t total = 0;
  for (size_t l = 0; l < 3; ++l) {
    total += std::ssize(kept[2 * l]) + std::ssize(kept[2 * l + 1]);
    std::vector<int32_t> common;  // equal but for a tie at the cut of all layers
    std::set_intersection(kept[2 * l].begin(), kept[2 * l].end(), kept[2 * l + 1].begin(),
                          kept[2 * l + 1].end(), std::back_inserter(common));
    EXPECT_GE(common.size() + 1, std::max(kept[2 * l].size(), kept[2 * l + 1].size()));
  }
  EXPECT_EQ(total, 6 * 112);
}

// Of a set of evicted positions by KV head: the change of the window's outputs, all heads together,
// and the sum of ||A[:, i]|| ||v_i W|| that bounds it.
struct Dropped {
  double change = 0, bound = 0;
};
Dropped dropped(const Replay& replay, const std::vector<std::vector<int>>& evicted) {
  Dropped sum;
  std::vector<std::vector<double>> change(kWindow, std::vector<double>(kHidden, 0.0));
  for (int head = 0; head < replay.query_heads(); ++head) {
    std::vector<std::vector<double>> rows;
    for (int i = kPrefix; i < kPrompt; ++i) rows.push_back(attention(replay, 0, head, i));
    for (const int t : evicted[size_t(head / replay.group)]) {
      const std::vector<double> y = projected(replay, 0, head, t);
      std::vector<double> column;
      for (size_t i = 0; i < kWindow; ++i) {
        column.push_back(rows[i][size_t(t)]);
        for (size_t x = 0; x < kHidden; ++x) change[i][x] += rows[i][size_t(t)] * y[x];
      }
      sum.bound += norm(column) * norm(y);
    }
  }
  double squares = 0;
  for (const auto& row : change) squares += norm(row) * norm(row);
  sum.change = std::sqrt(squares);
  return sum;
}

// The reason for the score: what it drops has the smallest bound of all sets of that many.
TEST(LaProxTest, DropsTheLeastBoundOfTheChange) {
  const Replay replay(kPrompt, 1, 5, 1, kHidden);
  const auto kept = replay.run(laprox("cpu", 212, ",kernel_size=1,group=score"), kPrompt).positions;
  std::vector<std::vector<int>> evicted(Replay::kHeads), others(Replay::kHeads);
  Random random(6);
  for (size_t h = 0; h < Replay::kHeads; ++h) {
    for (int t = 0; t < kPrefix; ++t) {
      if (!std::binary_search(kept[h].begin(), kept[h].end(), t)) evicted[h].push_back(t);
    }
    std::vector<int> prefix(kPrefix);
    std::iota(prefix.begin(), prefix.end(), 0);
    for (size_t i = 0; i < evicted[h].size(); ++i) {  // as many, at random
      std::swap(prefix[i], prefix[i + random.below(prefix.size() - i)]);
      others[h].push_back(prefix[i]);
    }
  }
  const Dropped by_score = dropped(replay, evicted), at_random = dropped(replay, others);
  EXPECT_LE(by_score.change, by_score.bound);
  EXPECT_LT(by_score.bound, 0.9 * at_random.bound);
  // One for one: anything kept would have cost at least as much as anything dropped.
  double dearest_dropped = 0, cheapest_kept = 1e30;
  for (int h = 0; h < Replay::kHeads; ++h) {
    for (int t = 0; t < kPrefix; ++t) {
      std::vector<std::vector<int>> one(Replay::kHeads);
      one[size_t(h)] = {t};
      if (t % 25 != 0) continue;  // some of them
      const double cost = dropped(replay, one).bound;
      const auto& list = kept[size_t(h)];
      if (std::binary_search(list.begin(), list.end(), t)) {
        cheapest_kept = std::min(cheapest_kept, cost);
      } else {
        dearest_dropped = std::max(dearest_dropped, cost);
      }
    }
  }
  EXPECT_LE(dearest_dropped, cheapest_kept * (1 + 1e-5));
}

TEST(LaProxTest, SequencesOfABatchDoNotMix) {
  for (const char* variant : {"ref", "cpu"}) {
    const std::string laprox = std::string("laprox[") + variant + "](budget=112,window=100";
    expect_batch_equals_each_alone(laprox + ",pinned=7)", false, 100, 2, kHidden);
    expect_batch_equals_each_alone(laprox + ",share_heads=true,pinned=7)", false, 100, 2, kHidden);
    expect_batch_equals_each_alone("adakv(base=" + laprox + "),pinned=7)", false, 100, 2, kHidden);
  }
}

}  // namespace
}  // namespace sikv::testing
