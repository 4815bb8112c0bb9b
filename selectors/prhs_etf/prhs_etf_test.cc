#include <gtest/gtest.h>

#include "tests/support/layers.h"

namespace sikv::testing {
namespace {

const Variant& etf() { return find_variant(SIKV_SELECTOR, "prhs_etf"); }

constexpr int kLayers = 4, kGroup = 3;

TEST(PrhsEtfTest, NothingFrozenIsTheOracleInEveryLayer) {
  Layers layers(kLayers, kGroup);
  SelectorSession session(etf(), {{"budget", "25"}, {"gamma", "0"}}, layers.filled, kGroup);
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::vector<Slots> rows = layers.select(session, layer, 0);
    SelectorSession oracle(find_variant(SIKV_SELECTOR, "oracle"), {{"budget", "25"}}, layers.filled,
                           kGroup);
    oracle.observe_everything();
    expect_equal_but_for_the_cut(rows, layers.select(oracle, layer, 0));
  }
}

// In the frozen prefix a layer has nothing that the layer below had not.
TEST(PrhsEtfTest, TakesOfTheFrozenPrefixOnlyWhatTheLayerBelowAttendedTo) {
  Layers layers(kLayers, kGroup);
  SelectorSession session(etf(), {{"budget", "25"}, {"first_layer", "0"}, {"psi", "0.5"}},
                          layers.filled, kGroup);
  const sikv_cache_view& view = layers.filled.cache.view();
  for (int step = 0; step < 2; ++step) {
    std::vector<Slots> below = layers.select(session, 0, step);
    for (int layer = 1; layer < kLayers; ++layer) {
      const std::vector<Slots> rows = layers.select(session, layer, step);
      for (size_t row = 0; row < rows.size(); ++row) {
        Slots attended = below[row];
        const int32_t* pinned =
            view.pinned_slots + static_cast<int64_t>(row) * view.pinned_capacity;
        attended.insert(attended.end(), pinned, pinned + view.pinned_len[row]);
        std::sort(attended.begin(), attended.end());
        const double length = row < 2 ? 309 : 110;
        const auto frozen = static_cast<int32_t>((1 - std::pow(0.5, layer / 4.0)) * length);
        EXPECT_EQ(rows[row].size(), 25u);
        EXPECT_GE(rows[row].back(), frozen);
        for (const int32_t slot : rows[row]) {
          if (slot >= frozen) break;
          EXPECT_TRUE(std::binary_search(attended.begin(), attended.end(), slot))
              << "layer " << layer << ", row " << row << ", slot " << slot;
        }
      }
      below = rows;
    }
  }
}

// A step that begins in the middle has nothing below to take from.
TEST(PrhsEtfTest, SearchesEverythingWhereTheLayerBelowDidNotRun) {
  Layers layers(kLayers, kGroup);
  SelectorSession session(etf(), {{"budget", "25"}, {"first_layer", "0"}, {"psi", "0.1"}},
                          layers.filled, kGroup),
      never(etf(), {{"budget", "25"}, {"gamma", "0"}}, layers.filled, kGroup);
  layers.select(session, 2, 0);
  EXPECT_EQ(layers.select(session, 3, 1), layers.select(never, 3, 1));
}

TEST(PrhsEtfTest, ReadsLessWhereMoreIsFrozen) {
  Layers layers(kLayers, kGroup);
  const auto bytes = [&](const char* psi) {
    SelectorSession session(etf(), {{"budget", "5"}, {"first_layer", "0"}, {"psi", psi}},
                            layers.filled, kGroup);
    for (int layer = 0; layer < kLayers; ++layer) layers.select(session, layer, 0);
    return counters_of(session).at("scan_bytes");
  };
  EXPECT_EQ(bytes("1"), kLayers * 2 * (309 + 110) * 128.0);
  EXPECT_LT(bytes("0.7"), bytes("1"));
  EXPECT_LT(bytes("0.3"), 0.8 * bytes("1"));
}

}  // namespace
}  // namespace sikv::testing
