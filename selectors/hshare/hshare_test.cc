#include <gtest/gtest.h>

#include <set>

#include "selectors/hshare/hshare_map.h"
#include "tests/support/layers.h"

namespace sikv::testing {
namespace {

using hshare::greedy_sources;

const Variant& method() { return find_variant(SIKV_SELECTOR, "hshare"); }

constexpr int kLayers = 4, kGroup = 3, kHeads = 4;

// The prompt in every layer, with other queries in each.
void observe(Layers& layers, SelectorSession& session) {
  std::vector<int> prompt = layers.spec.encoded;
  for (size_t b = 0; b < prompt.size(); ++b) prompt[b] += layers.spec.tail[b];
  const std::vector<int> start(prompt.size(), 0);
  const RowsPart keys = layers.filled.k.part(start, prompt),
                 values = layers.filled.v.part(start, prompt);
  for (int b = 0; b < 2; ++b) session.selector().begin_sequence(b);
  for (int layer = 0; layer < kLayers; ++layer) {
    layers.at(layer);
    const std::vector<uint8_t> queries = gaussian_queries(layers.spec, kGroup, 8, 50 + layer);
    sikv_observe_args args{};
    args.struct_size = sizeof args;
    args.num_queries = 8;
    args.view = &layers.filled.cache.view();
    args.keys = keys.rows;
    args.values = values.rows;
    args.queries = queries.data();
    args.prompt_len = keys.count.data();
    session.selector().observe(args, nullptr, nullptr);
  }
}

// The best by q.k over all channels, q the mean of the group's queries.
Slots best_by_mean_query(const FilledCache& filled, int row, const std::vector<uint8_t>& q,
                         size_t budget) {
  const sikv_cache_view& view = filled.cache.view();
  const int b = row / view.num_kv_heads, h = row % view.num_kv_heads, dim = view.head_dim;
  Slots slots = candidates(filled.cache, row);
  std::vector<double> scores(static_cast<size_t>(view.encoded_len[row]));
  for (const int32_t slot : slots) {
    for (int i = 0; i < kGroup * dim; ++i) {
      scores[static_cast<size_t>(slot)] +=
          double{sikv_load(q.data(), view.dtype, int64_t{row} * kGroup * dim + i)} *
          filled.k.at(b, slot, h, i % dim);
    }
  }
  std::stable_sort(slots.begin(), slots.end(), [&](int32_t a, int32_t c) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(c)];
  });
  slots.resize(std::min(budget, slots.size()));
  std::sort(slots.begin(), slots.end());
  return slots;
}

// ---- greedy -------------------------------------------------------------------------------------

TEST(GreedySourcesTest, TakesTheMostAlikeAndCollapsesChains) {
  // 3 from 2 first, then 2 from 1 (as 2 is no consumer yet), and 3 ends at 1.
  const std::vector<std::vector<double>> similarity = {
      {0, 0, 0, 0}, {1, 0, 0, 0}, {2, 5, 0, 0}, {3, 4, 9, 0}};
  EXPECT_EQ(greedy_sources(similarity, 0), (std::vector<int>{0, 1, 2, 3}));
  EXPECT_EQ(greedy_sources(similarity, 1), (std::vector<int>{0, 1, 2, 2}));
  EXPECT_EQ(greedy_sources(similarity, 2), (std::vector<int>{0, 1, 1, 1}));
  EXPECT_EQ(greedy_sources(similarity, 3), (std::vector<int>{0, 0, 0, 0}));
}

TEST(GreedySourcesTest, LeavesSoManyRootsWhateverIsAlike) {
  Random random(3);
  for (int n = 1; n < 12; ++n) {
    std::vector<std::vector<double>> similarity(static_cast<size_t>(n));
    for (auto& row : similarity) {
      for (int j = 0; j < n; ++j) row.push_back(1.0 + static_cast<double>(random.below(100)));
    }
    for (int shared = 0; shared < n; ++shared) {
      const std::vector<int> source = greedy_sources(similarity, shared);
      EXPECT_EQ(std::set<int>(source.begin(), source.end()).size(),
                static_cast<size_t>(n - shared));
      for (int i = 0; i < n; ++i) {
        const int root = source[static_cast<size_t>(i)];
        EXPECT_LE(root, i);  // so that it has selected before
        EXPECT_EQ(source[static_cast<size_t>(root)], root);
      }
    }
  }
}

TEST(GreedySourcesTest, SharesNothingWithoutOverlap) {
  EXPECT_EQ(greedy_sources({{0, 0}, {0, 0}}, 1), (std::vector<int>{0, 1}));
}

// ---- the selector -------------------------------------------------------------------------------

const Choices kUnshared = {{"budget", "25"},
                           {"channels", "64"},
                           {"period", "1"},
                           {"share_layers", "0"},
                           {"share_heads", "0"}};

TEST(HShareTest, WithoutSharingIsItsBaseSelector) {
  Layers layers(kLayers, kGroup, kHeads);
  SelectorSession session(method(), kUnshared, layers.filled, kGroup);
  observe(layers, session);
  for (int step = 0; step < 2; ++step) {
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::vector<Slots> rows = layers.select(session, layer, step);
      std::vector<Slots> want;
      for (int row = 0; row < layers.filled.cache.num_rows(); ++row) {
        want.push_back(best_by_mean_query(layers.filled, row, layers.queries(layer, step), 25));
      }
      expect_equal_but_for_the_cut(rows, want);
    }
  }
  EXPECT_EQ(counters_of(session).at("reused"), 0);
  EXPECT_EQ(counters_of(session).at("scan_bytes"), 2.0 * kLayers * kHeads * (300 + 70) * 64 * 2);
}

TEST(HShareTest, AStepServesThePeriod) {
  Layers layers(kLayers, kGroup, kHeads);
  Choices choices = kUnshared;
  choices[2].second = "3";
  SelectorSession session(method(), choices, layers.filled, kGroup);
  observe(layers, session);
  std::vector<Slots> fresh;
  for (int step = 5; step < 14; ++step) {  // the first step selects, whatever its number
    const std::vector<Slots> rows = layers.select(session, 1, step);
    if ((step - 5) % 3 == 0) {
      EXPECT_NE(rows, fresh);
      fresh = rows;
    }
    EXPECT_EQ(rows, fresh) << step;
  }
  EXPECT_EQ(counters_of(session).at("from_step"), 2 * kHeads * 6);
}

TEST(HShareTest, HalfTheLayersTakeAnEarlierOnesSelection) {
  Layers layers(kLayers, kGroup, kHeads, 0);
  Choices choices = kUnshared;
  choices[3].second = "0.5";
  SelectorSession session(method(), choices, layers.filled, kGroup);
  observe(layers, session);
  for (int step = 0; step < 3; ++step) {
    std::vector<std::vector<Slots>> seen;
    std::vector<int> copies(2, 0);  // of each sequence
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::vector<Slots> rows = layers.select(session, layer, step);
      for (size_t b = 0; b < 2; ++b) {
        const auto same = [&](const std::vector<Slots>& other) {
          return std::equal(rows.begin() + static_cast<ptrdiff_t>(b * kHeads),
                            rows.begin() + static_cast<ptrdiff_t>((b + 1) * kHeads),
                            other.begin() + static_cast<ptrdiff_t>(b * kHeads));
        };
        copies[b] += std::any_of(seen.begin(), seen.end(), same);
      }
      seen.push_back(rows);
    }
    EXPECT_EQ(copies, (std::vector<int>{2, 2}));
  }
  EXPECT_EQ(counters_of(session).at("from_layer"), 3 * 2 * 2 * kHeads);
}

TEST(HShareTest, HalfTheHeadsTakeAnEarlierOnesSelection) {
  Layers layers(kLayers, kGroup, kHeads, 0);
  Choices choices = kUnshared;
  choices[4].second = "0.5";
  SelectorSession session(method(), choices, layers.filled, kGroup);
  observe(layers, session);
  const std::vector<Slots> rows = layers.select(session, 2, 0);
  for (int b = 0; b < 2; ++b) {
    const std::set<Slots> distinct(rows.begin() + b * kHeads, rows.begin() + (b + 1) * kHeads);
    EXPECT_EQ(distinct.size(), 2u);
  }
  EXPECT_EQ(counters_of(session).at("from_head"), 2 * 2);
}

// Step before layer before head: an eighth of the cells selects afresh.
TEST(HShareTest, TheDefaultsSelectInAnEighthOfTheCells) {
  Layers layers(kLayers, kGroup, kHeads);
  SelectorSession session(method(), {{"budget", "25"}}, layers.filled, kGroup);
  observe(layers, session);
  for (int step = 0; step < 8; ++step) {
    for (int layer = 0; layer < kLayers; ++layer) layers.select(session, layer, step);
  }
  const double cells = 8.0 * kLayers * 2 * kHeads;
  EXPECT_EQ(counters_of(session).at("runs"), cells);
  EXPECT_EQ(counters_of(session).at("from_step"), cells / 2);
  EXPECT_EQ(counters_of(session).at("from_layer"), cells / 4);
  EXPECT_EQ(counters_of(session).at("from_head"), cells / 8);
  EXPECT_EQ(counters_of(session).at("reused"), cells * 7 / 8);
}

// A pinned slot of the taker leaves its place to the next, so that no budget is lost.
TEST(HShareTest, TakersFillThePlacesOfTheirPinnedTokens) {
  Layers layers(kLayers, kGroup, kHeads, 12);
  SelectorSession session(method(), {{"budget", "25"}, {"channels", "64"}}, layers.filled, kGroup);
  observe(layers, session);
  for (int layer = 0; layer < kLayers; ++layer) {
    for (const Slots& slots : layers.select(session, layer, 0)) EXPECT_EQ(slots.size(), 25u);
  }
}

TEST(HShareTest, ANewPageIsSelectedFromAtOnce) {
  const CacheSpec spec{.num_kv_heads = 1, .encoded = {512}, .tail = {1}, .pinned = 4};
  const sikv_shape shape = tight_shape(spec, 1);
  FilledCache filled(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
  SelectorSession session(method(), {{"budget", "40"}, {"period", "100"}}, filled, kGroup);
  filled.cache.set_encoded_len(0, 256);
  session.observe({300});
  session.select(0);
  filled.cache.set_encoded_len(0, 512);
  session.observe_page({256});
  EXPECT_GE(session.select(1)[0].back(), 256);
  EXPECT_EQ(counters_of(session).at("reused"), 0);
}

}  // namespace
}  // namespace sikv::testing
