#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "tests/support/scored_selector.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

constexpr int kGroup = 2, kHidden = 24, kDim = 64;

const Variant& criticalkv() { return find_variant(SIKV_SELECTOR, "criticalkv"); }

class CriticalKvTest : public ::testing::Test {
 protected:
  CriticalKvTest() {
    Random random(5);
    for (int i = 0; i < 2 * kGroup * kDim * kHidden; ++i) {
      w_o_.push_back(static_cast<float>(random.normal()));
    }
    ScoredAnswers& answers = scored::answers();
    answers = {};
    for (int row = 0; row < filled_.cache.num_rows(); ++row) {
      const int encoded = filled_.cache.view().encoded_len[row];
      std::vector<float> scores;
      for (int t = 0; t < encoded; ++t) {
        scores.push_back(t + 3 >= encoded ? std::numeric_limits<float>::infinity()
                                          : static_cast<float>(random.uniform() / 100));
      }
      Slots keep;
      for (int t = 0; t < encoded; t += 2 + row) keep.push_back(t);
      answers.scores.push_back(scores);
      answers.keep.push_back(keep);
    }
  }
  void observe(SelectorInstance& selector) {
    const std::vector<int> start = {0, 0};
    std::vector<int> prompt = spec_.encoded;
    for (size_t b = 0; b < prompt.size(); ++b) prompt[b] += spec_.tail[b];
    const RowsPart keys = filled_.k.part(start, prompt), values = filled_.v.part(start, prompt);
    selector.observe({sizeof(sikv_observe_args), 0, &filled_.cache.view(), keys.rows, values.rows,
                      nullptr, keys.rows.count, w_o_.data(), kHidden, 0},
                     nullptr, nullptr);
  }
  // The mean over the group of || v w_h ||_1, in fp64.
  double norm(int row, int token) const {
    const int b = row / 2, h = row % 2;
    double sum = 0;
    for (int g = 0; g < kGroup; ++g) {
      for (int i = 0; i < kHidden; ++i) {
        double x = 0;
        for (int d = 0; d < kDim; ++d) {
          x += double{filled_.v.at(b, token, h, d)} *
               w_o_[static_cast<size_t>(((h * kGroup + g) * kDim + d) * kHidden + i)];
        }
        sum += std::abs(x) / kGroup;
      }
    }
    return sum;
  }
  Slots competing(int row) const {
    Slots slots = candidates(filled_.cache, row);
    const int encoded = filled_.cache.view().encoded_len[row];
    std::erase_if(slots, [&](int32_t slot) { return slot + 3 >= encoded; });
    return slots;
  }
  size_t budget(int row) const {
    const Slots all = competing(row);
    const Slots& keep = scored::answers().keep[static_cast<size_t>(row)];
    return static_cast<size_t>(std::count_if(keep.begin(), keep.end(), [&](int32_t slot) {
      return std::binary_search(all.begin(), all.end(), slot);
    }));
  }
  // Both stages, slot by slot.
  Slots expected(int row, double first_stage) const {
    const std::vector<float>& scores = scored::answers().scores[static_cast<size_t>(row)];
    Slots order = competing(row), chosen;
    const auto take = [&](size_t count, auto&& value) {
      std::stable_sort(order.begin(), order.end(),
                       [&](int32_t a, int32_t b) { return value(a) > value(b); });
      chosen.insert(chosen.end(), order.begin(), order.begin() + static_cast<int64_t>(count));
      order.erase(order.begin(), order.begin() + static_cast<int64_t>(count));
      std::sort(order.begin(), order.end());
    };
    const auto first = static_cast<size_t>(first_stage * static_cast<double>(budget(row)));
    take(first, [&](int32_t slot) { return double{scores[static_cast<size_t>(slot)]}; });
    take(budget(row) - first, [&](int32_t slot) {
      return (scores[static_cast<size_t>(slot)] + 1e-4) * norm(row, slot);
    });
    std::sort(chosen.begin(), chosen.end());
    return chosen;
  }

  const CacheSpec spec_{.num_kv_heads = 2, .encoded = {120, 61}, .tail = {4, 1}, .pinned = 5};
  const sikv_shape shape_ = tight_shape(spec_, kGroup);
  const FilledCache filled_{spec_, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape_),
                            make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape_)};
  std::vector<float> w_o_;
};

TEST_F(CriticalKvTest, FillsTheBudgetByScoreAndThenByNorm) {
  for (const char* first_stage : {"0", "0.5", "0.8", "1"}) {
    SelectorInstance selector = wrap_scored(criticalkv(), {{"first_stage", first_stage}}, shape_);
    observe(selector);
    const std::vector<Slots> kept = evictions(selector, filled_.cache);
    for (int row = 0; row < filled_.cache.num_rows(); ++row) {
      SCOPED_TRACE("row " + std::to_string(row) + ", first stage " + first_stage);
      const Slots all = competing(row);
      Slots chosen, fixed;
      for (const int32_t slot : kept[static_cast<size_t>(row)]) {
        (std::binary_search(all.begin(), all.end(), slot) ? chosen : fixed).push_back(slot);
      }
      EXPECT_EQ(chosen, expected(row, std::stod(first_stage)));
      EXPECT_EQ(fixed.size(),
                static_cast<size_t>(filled_.cache.view().encoded_len[row]) - all.size());
    }
  }
}

// Budgets by adakv from the scores as they are, both stages within them.
TEST_F(CriticalKvTest, KeepsTheBudgetsOfAdaKv) {
  const Variant& adakv = find_variant(SIKV_SELECTOR, "adakv");
  SelectorInstance plain = wrap_scored(adakv, {}, shape_);
  SelectorInstance both = wrap_scored(
      criticalkv(), {}, shape_, std::make_unique<SelectorInstance>(wrap_scored(adakv, {}, shape_)));
  observe(both);
  const std::vector<Slots> split = evictions(plain, filled_.cache),
                           chosen = evictions(both, filled_.cache);
  for (size_t row = 0; row < split.size(); ++row) {
    EXPECT_EQ(split[row].size(), chosen[row].size());
    EXPECT_NE(split[row], chosen[row]);
  }
}

TEST_F(CriticalKvTest, NeedsTheOutputProjection) {
  const SelectorInstance selector = wrap_scored(criticalkv(), {}, shape_);
  EXPECT_EQ(selector.table().flags, SIKV_SELECTOR_NEEDS_W_O);
  EXPECT_FALSE(selector.scores());
}

TEST_F(CriticalKvTest, CountsOneNormPerEncodedToken) {
  SelectorInstance selector = wrap_scored(criticalkv(), {}, shape_);
  observe(selector);
  EXPECT_EQ(selector.state_bytes(), 2u * (120 + 61) * sizeof(float));
  selector.begin_sequence(0);
  EXPECT_EQ(selector.state_bytes(), 2u * 61 * sizeof(float));
}

}  // namespace
}  // namespace sikv::testing
