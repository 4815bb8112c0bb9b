#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "tests/support/scored_selector.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

constexpr float kFixed = std::numeric_limits<float>::infinity();

const Variant& adakv() { return find_variant(SIKV_SELECTOR, "adakv"); }

class AdaKvTest : public ::testing::Test {
 protected:
  // Two sequences of three heads; scores of heads differ in scale, the newest tokens are fixed.
  void draw(uint64_t seed) {
    Random random(seed);
    ScoredAnswers& answers = scored::answers();
    answers = {};
    for (int row = 0; row < filled_.cache.num_rows(); ++row) {
      const int encoded = filled_.cache.view().encoded_len[row];
      const double scale = std::exp(2.0 * random.normal());
      std::vector<float> scores;
      for (int t = 0; t < encoded; ++t) {
        scores.push_back(t + 5 >= encoded ? kFixed : static_cast<float>(scale * random.uniform()));
      }
      // What the base keeps is its `budget` best, as SnapKV would.
      const auto budget = static_cast<size_t>(random.below(60));
      Slots order = competing(row);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
      });
      order.resize(std::min(budget, order.size()));
      for (int t = encoded - 5; t < encoded; ++t) order.push_back(t);
      std::sort(order.begin(), order.end());
      answers.scores.push_back(scores);
      answers.keep.push_back(order);
    }
  }
  // Slots of a row that are neither pinned nor among the newest 5.
  Slots competing(int row) const {
    Slots slots = candidates(filled_.cache, row);
    const int encoded = filled_.cache.view().encoded_len[row];
    std::erase_if(slots, [&](int32_t slot) { return slot + 5 >= encoded; });
    return slots;
  }
  Slots chosen(const Slots& list, int row) const {
    const Slots all = competing(row);
    Slots both;
    std::set_intersection(list.begin(), list.end(), all.begin(), all.end(),
                          std::back_inserter(both));
    return both;
  }
  std::vector<Slots> split(const std::string& alpha) {
    SelectorInstance selector = wrap_scored(adakv(), {{"alpha", alpha}}, shape_);
    return evictions(selector, filled_.cache);
  }

  const CacheSpec spec_{.num_kv_heads = 3, .encoded = {300, 97}, .tail = {1, 1}, .pinned = 7};
  const sikv_shape shape_ = tight_shape(spec_, 1);
  const FilledCache filled_{spec_, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape_),
                            make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape_)};
};

TEST_F(AdaKvTest, AllocatesExactlyTheTotalBudget) {
  for (uint64_t seed = 1; seed < 40; ++seed) {
    draw(seed);
    for (const char* alpha : {"0", "0.2", "0.37", "0.5", "1"}) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", alpha " + alpha);
      const std::vector<Slots> kept = split(alpha);
      for (int first = 0; first < filled_.cache.num_rows(); first += 3) {
        size_t before = 0, after = 0;
        for (int row = first; row < first + 3; ++row) {
          const auto i = static_cast<size_t>(row);
          const size_t own = chosen(scored::answers().keep[i], row).size();
          const size_t got = chosen(kept[i], row).size();
          before += own;
          after += got;
          // The safeguard: nobody falls below its uniform share by a whole token.
          EXPECT_GT(static_cast<double>(got) + 1, std::stod(alpha) * static_cast<double>(own));
          // Pinned and fixed tokens stay, and nothing is listed twice.
          EXPECT_EQ(kept[i].size(), got +
                                        static_cast<size_t>(filled_.cache.view().encoded_len[row]) -
                                        competing(row).size());
          EXPECT_TRUE(std::is_sorted(kept[i].begin(), kept[i].end(), std::less_equal<>()) ||
                      kept[i].size() < 2);
        }
        EXPECT_EQ(after, before);
      }
    }
  }
}

TEST_F(AdaKvTest, WithoutSafeguardTheBestOfAllHeadsStay) {
  for (uint64_t seed = 1; seed < 10; ++seed) {
    draw(seed);
    const std::vector<Slots> kept = split("0");
    for (int first = 0; first < filled_.cache.num_rows(); first += 3) {
      float worst_kept = kFixed, best_dropped = -kFixed;
      for (int row = first; row < first + 3; ++row) {
        const Slots own = chosen(kept[static_cast<size_t>(row)], row);
        for (const int32_t slot : competing(row)) {
          const float score =
              scored::answers().scores[static_cast<size_t>(row)][static_cast<size_t>(slot)];
          if (std::binary_search(own.begin(), own.end(), slot)) {
            worst_kept = std::min(worst_kept, score);
          } else {
            best_dropped = std::max(best_dropped, score);
          }
        }
      }
      EXPECT_GE(worst_kept, best_dropped) << "seed " << seed;
    }
  }
}

TEST_F(AdaKvTest, WithTheWholeBudgetSafeguardedTheBaseDecides) {
  draw(3);
  const std::vector<Slots> kept = split("1");
  for (int row = 0; row < filled_.cache.num_rows(); ++row) {
    const auto i = static_cast<size_t>(row);
    EXPECT_EQ(chosen(kept[i], row), chosen(scored::answers().keep[i], row));
  }
}

TEST_F(AdaKvTest, FollowsABaseThatKeepsRows) {
  draw(4);
  ScoredAnswers& answers = scored::answers();
  for (size_t row = 0; row < 3; ++row) answers.keep[row] = {SIKV_SELECT_ALL};
  answers.keep[3] = {SIKV_SELECT_ALL};
  const std::vector<Slots> kept = split("0.2");
  for (size_t row = 0; row < 3; ++row) EXPECT_EQ(kept[row], Slots{SIKV_SELECT_ALL});
  // A row that the base keeps gives its tokens to the common budget.
  size_t before = competing(3).size(), after = 0;
  for (int row = 3; row < 6; ++row) {
    const auto i = static_cast<size_t>(row);
    if (row > 3) before += chosen(answers.keep[i], row).size();
    after +=
        kept[i] == Slots{SIKV_SELECT_ALL} ? competing(row).size() : chosen(kept[i], row).size();
  }
  EXPECT_EQ(after, before);
}

TEST_F(AdaKvTest, RefusesABaseWithoutScores) {
  try {
    make_selector(adakv(), {{"base", "full"}}, shape_, cpu());
    FAIL() << "made";
  } catch (const Error& error) {
    EXPECT_STREQ(
        error.what(),
        "selector 'adakv' (ref): adakv splits the budget of a base that evicts tokens and "
        "tells their scores, and this one does not: wrap snapkv, pyramidkv, h2o or another "
        "such");
  }
}

}  // namespace
}  // namespace sikv::testing
