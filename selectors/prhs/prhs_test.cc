#include <gtest/gtest.h>

#include "framework/base/error.h"
#include "tests/support/layers.h"

namespace sikv::testing {
namespace {

const Variant& prhs() { return find_variant(SIKV_SELECTOR, "prhs"); }

constexpr int kLayers = 4, kGroup = 3;

// Sharing alone: no window, nothing frozen.
Choices sharing(Choices more) {
  more.insert(more.end(), {{"base", "oracle"}, {"alpha", "0"}, {"gamma", "0"}});
  return more;
}

TEST(PrhsTest, EverythingOffIsTheBase) {
  Layers layers(kLayers, kGroup);
  for (const char* base : {"oracle", "quest"}) {
    SelectorSession session(
        prhs(),
        {{"base", base}, {"base.budget", "25"}, {"tau", "1.5"}, {"alpha", "0"}, {"gamma", "0"}},
        layers.filled, kGroup),
        alone(find_variant(SIKV_SELECTOR, base), {{"budget", "25"}}, layers.filled, kGroup);
    session.observe_everything();
    alone.observe_everything();
    for (int step = 0; step < 4; ++step) EXPECT_EQ(session.select(step), alone.select(step));
    EXPECT_EQ(counters_of(session).at("base_calls"), 4);
  }
}

// Which tokens are the best of a list is ranked within the list, where the heads of a group may weigh
// differently than over all keys: with one head the orders are the same.
TEST(PrhsTest, SharesAsPrhsCisDoes) {
  Layers layers(kLayers, kGroup);
  for (const auto& [group, radius] : {std::pair{1, "2"}, std::pair{kGroup, "0"}}) {
    for (const char* tau : {"-2", "0.8"}) {
      const Choices rule = {{"tau", tau}, {"block", "4"}, {"radius", radius}};
      Choices around = sharing(rule), alone = rule;
      around.emplace_back("base.budget", "25");
      alone.emplace_back("budget", "25");
      SelectorSession session(prhs(), around, layers.filled, group),
          cis(find_variant(SIKV_SELECTOR, "prhs_cis"), alone, layers.filled, group);
      session.observe_everything();
      for (int step = 0; step < 9; ++step) {
        const std::vector<uint8_t> q = gaussian_queries(layers.spec, group, 1, step / 3);
        expect_equal_but_for_the_cut(session.select(step, q), cis.select(step, q));
      }
      EXPECT_EQ(counters_of(session).at("reused"), counters_of(cis).at("reused"));
      EXPECT_GT(counters_of(session).at("reused"), 0);
    }
  }
}

TEST(PrhsTest, DoesNotAskTheBaseWhereEveryRowShares) {
  Layers layers(kLayers, kGroup);
  SelectorSession session(prhs(), sharing({{"base.budget", "25"}, {"tau", "-2"}, {"block", "5"}}),
                          layers.filled, kGroup);
  session.observe_everything();
  for (int step = 0; step < 10; ++step) session.select(step);
  EXPECT_EQ(counters_of(session).at("layer_calls"), 10);
  EXPECT_EQ(counters_of(session).at("base_calls"), 2);
  EXPECT_EQ(counters_of(session).at("reused"), 4 * 8);
}

TEST(PrhsTest, ABigEnoughBudgetIsExactWithoutAWindow) {
  Layers layers(kLayers, kGroup);
  SelectorSession session(prhs(), sharing({{"base.budget", "1000"}, {"tau", "-2"}}), layers.filled,
                          kGroup);
  session.observe_everything();
  for (int step = 0; step < 3; ++step) {
    const std::vector<Slots> rows = session.select(step);
    for (int row = 0; row < layers.filled.cache.num_rows(); ++row) {
      EXPECT_EQ(rows[static_cast<size_t>(row)], candidates(layers.filled.cache, row));
    }
  }
}

TEST(PrhsTest, WindowAndFrozenPrefixHoldInEveryLayerAndStep) {
  Layers layers(kLayers, kGroup);
  SelectorSession session(prhs(),
                          {{"base", "prhs_cis"},
                           {"base.budget", "25"},
                           {"base.tau", "1.5"},
                           {"tau", "-2"},
                           {"block", "3"},
                           {"first_layer", "0"},
                           {"phi", "0.8"},
                           {"psi", "0.4"}},
                          layers.filled, kGroup);
  const sikv_cache_view& view = layers.filled.cache.view();
  for (int step = 0; step < 4; ++step) {
    std::vector<Slots> below;
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::vector<Slots> rows = layers.select(session, layer, step);
      for (size_t row = 0; row < rows.size(); ++row) {
        const double length = row < 2 ? 309 : 110;
        const auto window = static_cast<int32_t>((1 - std::pow(0.8, layer / 4.0)) * length);
        const auto frozen = static_cast<int32_t>((1 - std::pow(0.4, layer / 4.0)) * length);
        EXPECT_LE(rows[row].size(), 25u);
        EXPECT_FALSE(rows[row].empty());
        for (const int32_t slot : rows[row]) EXPECT_GE(slot, window);
        if (layer == 0 || step % 3 != 0) continue;
        Slots attended = below[row];
        const int32_t* pinned =
            view.pinned_slots + static_cast<int64_t>(row) * view.pinned_capacity;
        attended.insert(attended.end(), pinned, pinned + view.pinned_len[row]);
        for (const int32_t slot : rows[row]) {
          if (slot >= frozen) break;
          EXPECT_EQ(std::count(attended.begin(), attended.end(), slot), 1)
              << "layer " << layer << ", row " << row << ", slot " << slot;
        }
      }
      below = rows;
    }
  }
}

TEST(PrhsTest, AuditedBoundHoldsAroundAnyBase) {
  Layers layers(kLayers, kGroup);
  for (const char* base : {"oracle", "quest"}) {
    SelectorSession session(
        prhs(), {{"base", base}, {"base.budget", "25"}, {"tau", "-2"}, {"audit", "true"}},
        layers.filled, kGroup);
    session.observe_everything();
    for (int step = 0; step < 6; ++step) session.select(step);
    EXPECT_EQ(counters_of(session).at("audited"), 4 * 5);
    EXPECT_EQ(counters_of(session).at("bound_violations"), 0);
    EXPECT_GT(counters_of(session).at("dropped"), 0);
  }
}

TEST(PrhsTest, RefusesABaseThatTakesEverything) {
  Layers layers(kLayers, kGroup);
  try {
    SelectorSession session(prhs(), {{"base", "full"}}, layers.filled, kGroup);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("choose one with a budget"), std::string::npos)
        << error.what();
  }
}

// Also through a wrapper that leaves run to its base.
TEST(PrhsTest, RefusesABaseThatEvicts) {
  Layers layers(kLayers, kGroup);
  for (const Choices& base :
       {Choices{{"base", "snapkv"}}, Choices{{"base", "adakv"}, {"base.base", "snapkv"}}}) {
    try {
      SelectorSession session(prhs(), base, layers.filled, kGroup);
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.what(), "selector 'prhs' (ref): '" + base[0].second +
                                  "' evicts, and what is left is attended to as a whole: wrap one "
                                  "that chooses in every step, such as quest");
    }
  }
}

}  // namespace
}  // namespace sikv::testing
