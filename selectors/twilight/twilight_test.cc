#include <gtest/gtest.h>

#include <cmath>

#include "framework/base/error.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

const Variant& variant_of(const std::string& name) {
  return find_variant(SIKV_SELECTOR, "twilight", name);
}

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const Candidate& candidate :
       registry().candidates(SIKV_SELECTOR, "twilight", cpu().info())) {
    if (candidate.score > 0) names.push_back(candidate.variant->variant);
  }
  return names;
}

FilledCache make_cache(const CacheSpec& spec, int group) {
  const sikv_shape shape = tight_shape(spec, group);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
}

// q . k over `channels`, the key with 4 bits per channel or as it is, in fp64.
double logit(const FilledCache& filled, int row, int group, int head, const std::vector<uint8_t>& q,
             int token, bool coarse) {
  const sikv_cache_view& view = filled.cache.view();
  const int b = row / view.num_kv_heads, h = row % view.num_kv_heads, dim = view.head_dim;
  std::vector<float> key;
  for (int d = 0; d < dim; ++d) key.push_back(filled.k.at(b, token, h, d));
  const auto [low, high] = std::minmax_element(key.begin(), key.end());
  const float zero = *low, scale = (*high - zero) / 15.0f;
  double sum = 0;
  for (int d = 0; d < dim; ++d) {
    const float x = key[static_cast<size_t>(d)];
    const float stored = coarse ? zero + scale * std::nearbyint((x - zero) / scale) : x;
    sum +=
        stored * double{sikv_load(q.data(), view.dtype, (int64_t{row} * group + head) * dim + d)};
  }
  return sum / std::sqrt(static_cast<double>(dim));
}

// Weight of every token of a row as the README defines it: candidates by their copies, pinned
// tokens and tail exactly, the mean of the heads' softmax.
std::map<int, double> weights_of(const FilledCache& filled, int row, int group,
                                 const std::vector<uint8_t>& q, const Slots& from) {
  const sikv_cache_view& view = filled.cache.view();
  std::map<int, bool> tokens;  // token -> coarse
  for (const int slot : from) tokens[slot] = true;
  const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  for (int i = 0; i < view.pinned_len[row]; ++i) tokens[pinned[i]] = false;
  for (int t = 0; t < view.tail_len[row / view.num_kv_heads]; ++t) {
    tokens[view.encoded_len[row] + t] = false;
  }
  std::map<int, double> mean;
  for (int g = 0; g < group; ++g) {
    std::map<int, double> e;
    double sum = 0;
    for (const auto& [token, coarse] : tokens) {
      sum += e[token] = std::exp(logit(filled, row, group, g, q, token, coarse));
    }
    for (const auto& [token, x] : e) mean[token] += x / sum / group;
  }
  return mean;
}

const CacheSpec kSpec{.num_kv_heads = 2, .encoded = {300, 70}, .tail = {9, 40}, .pinned = 12};
constexpr int kGroup = 3;

// The claim of the paper: at least p of the estimated mass, by the fewest tokens that have it.
TEST(TwilightTest, KeepsAtLeastPOfTheEstimatedMassAndNoTokenMore) {
  const FilledCache filled = make_cache(kSpec, kGroup);
  const std::vector<uint8_t> q = gaussian_queries(kSpec, kGroup, 1, 5);
  for (const std::string& variant : variants()) {
    for (const char* base : {"full", "quest"}) {
      for (const char* p : {"0.3", "0.6", "0.85", "0.95", "0.999"}) {
        SCOPED_TRACE(variant + " around " + base + ", p " + p);
        Choices choices = {{"base", base}, {"p", p}};
        if (base == std::string("quest")) choices.emplace_back("base.budget", "150");
        SelectorSession session(variant_of(variant), choices, filled, kGroup);
        choices[1].second = "1";
        SelectorSession everything(variant_of(variant), choices, filled, kGroup);
        session.observe_everything();
        everything.observe_everything();
        const std::vector<Slots> kept = session.select(0, q), from = everything.select(0, q);
        for (size_t row = 0; row < kept.size(); ++row) {
          SCOPED_TRACE("row " + std::to_string(row));
          auto weights = weights_of(filled, static_cast<int>(row), kGroup, q, from[row]);
          std::map<int, double> dropped;
          double mass = 0, lightest = 1, heaviest = 0;
          for (const int slot : from[row]) {
            if (std::binary_search(kept[row].begin(), kept[row].end(), slot)) {
              lightest = std::min(lightest, weights[slot]);
            } else {
              heaviest = std::max(heaviest, weights[slot]);
              dropped[slot] = weights[slot];
            }
          }
          for (const auto& [token, weight] : weights) {
            if (!dropped.contains(token)) mass += weight;
          }
          EXPECT_GE(mass, std::stod(p) - 1e-6);
          if (!kept[row].empty()) {
            EXPECT_LT(mass - lightest, std::stod(p) + 1e-6);
          }
          EXPECT_GE(lightest, heaviest - 1e-6);
        }
      }
    }
  }
}

TEST(TwilightTest, WithAllOfTheMassTheBaseDecides) {
  const FilledCache filled = make_cache(kSpec, kGroup);
  const std::vector<uint8_t> q = gaussian_queries(kSpec, kGroup, 1, 5);
  const auto select = [&](const Variant& variant, const Choices& choices) {
    SelectorSession session(variant, choices, filled, kGroup);
    session.observe_everything();
    return session.select(0, q);
  };
  for (const std::string& variant : variants()) {
    EXPECT_EQ(select(variant_of(variant), {{"base", "quest"}, {"base.budget", "40"}, {"p", "1"}}),
              select(find_variant(SIKV_SELECTOR, "quest"), {{"budget", "40"}}));
    // Around the oracle with budget enough: everything, and thus exact.
    const auto all =
        select(variant_of(variant), {{"base", "oracle"}, {"base.budget", "100000"}, {"p", "1"}});
    for (int row = 0; row < filled.cache.num_rows(); ++row) {
      EXPECT_EQ(all[static_cast<size_t>(row)], candidates(filled.cache, row));
    }
    for (const Slots& slots : select(variant_of(variant), {{"base", "full"}, {"p", "0"}})) {
      EXPECT_TRUE(slots.empty());
    }
  }
}

TEST(TwilightTest, MoreMassKeepsWhatLessKept) {
  const FilledCache filled = make_cache(kSpec, kGroup);
  for (const std::string& variant : variants()) {
    std::vector<Slots> before;
    for (const char* p : {"0.5", "0.7", "0.9", "0.99"}) {
      SelectorSession session(variant_of(variant), {{"base", "full"}, {"p", p}}, filled, kGroup);
      session.observe_everything();
      const std::vector<Slots> now = session.select(0);
      for (size_t row = 0; row < before.size(); ++row) {
        EXPECT_TRUE(
            std::includes(now[row].begin(), now[row].end(), before[row].begin(), before[row].end()))
            << variant << " p " << p << " row " << row;
        EXPECT_LE(before[row].size(), now[row].size());
      }
      before = now;
    }
  }
}

// 8 bytes and half a byte per channel for every encoded token, beside the base's.
TEST(TwilightTest, CountsItsCopiesAndWhatItReads) {
  const FilledCache filled = make_cache(kSpec, kGroup);
  SelectorSession session(variant_of("ref"), {{"base", "full"}, {"p", "0.5"}}, filled, kGroup);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 2u * (300 + 70) * (8 + 32));
  const auto kept = session.select(0);
  std::map<std::string, double> counted;
  for (const sikv_counter& c : session.selector().counters()) counted[c.name] = c.value;
  EXPECT_EQ(counted["runs"], 4);
  // 12 pinned and 9 or 40 tail tokens as fp16 keys, all others as copies.
  EXPECT_EQ(counted["scan_bytes"], 2 * ((288 + 58) * 40.0 + (12 + 9 + 12 + 40) * 128.0));
  EXPECT_EQ(counted["twilight_candidates"], 2 * (288 + 58));
  double total = 0;
  for (const Slots& slots : kept) total += static_cast<double>(slots.size());
  EXPECT_EQ(counted["twilight_kept"], total);
  session.selector().begin_sequence(0);
  EXPECT_EQ(session.selector().state_bytes(), 2u * 70 * (8 + 32));
}

TEST(TwilightTest, EvictsWhereItsBaseDoes) {
  const FilledCache filled = make_cache(kSpec, kGroup);
  SelectorSession keeping(variant_of("ref"), {{"base", "quest"}}, filled, kGroup);
  EXPECT_FALSE(keeping.selector().evicts());
  SelectorSession evicting(variant_of("ref"),
                           {{"base", "streaming"}, {"base.evict", "true"}, {"base.budget", "20"}},
                           filled, kGroup);
  EXPECT_TRUE(evicting.selector().evicts());
}

// Of what an evicting base leaves, also through a wrapper that leaves run to it.
TEST(TwilightTest, PrunesWhatABaseSelectsAsAWhole) {
  const FilledCache filled = make_cache(kSpec, kGroup);
  for (const Choices& base :
       {Choices{{"base", "snapkv"}}, Choices{{"base", "adakv"}, {"base.base", "snapkv"}}}) {
    Choices choices = base;
    choices.emplace_back("p", "0.5");
    SelectorSession session(variant_of("ref"), choices, filled, kGroup);
    session.observe_everything();
    const std::vector<Slots> kept = session.select(0);
    for (int row = 0; row < filled.cache.num_rows(); ++row) {
      EXPECT_LT(kept[static_cast<size_t>(row)].size(), candidates(filled.cache, row).size());
    }
  }
}

TEST(TwilightTest, HasNoBaseOfItsOwn) {
  const Variant& variant = variant_of("ref");
  try {
    OptionSet::parse(variant.options, {}, "selector 'twilight'");
    FAIL() << "parsed";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "selector 'twilight' wraps another selector and has none; add base: {name: ...} "
                 "(whose selection is pruned: give it a generous budget)");
  }
}

}  // namespace
}  // namespace sikv::testing
