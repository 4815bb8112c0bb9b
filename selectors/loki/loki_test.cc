#include <gtest/gtest.h>

#include <fstream>

#include "framework/base/error.h"
#include "tests/support/ranking.h"
#include "tests/support/temporary.h"

namespace sikv::testing {
namespace {

const Variant& loki() { return find_variant(SIKV_SELECTOR, "loki"); }

CacheSpec two_sequences() {
  return {
      .num_kv_heads = 2, .dtype = SIKV_FP32, .encoded = {300, 70}, .tail = {9, 0}, .pinned = 12};
}

FilledCache make_cache(const CacheSpec& spec) {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape), Pattern::kOffset);
}

// The best by q.k over `channels` (all where empty), one query head per KV head.
Slots best_by_dot(const FilledCache& filled, int row, const std::vector<uint8_t>& q, size_t budget,
                  const std::vector<int>& channels = {}) {
  const std::vector<float> head = query_of(filled, q, row);
  return best_slots(filled, row, budget, [&](int slot) {
    const std::vector<float> key = key_of(filled, row, slot);
    if (channels.empty()) return dot(head, key);
    double sum = 0.0;
    for (int d : channels) {
      sum += double{head[static_cast<size_t>(d)]} * key[static_cast<size_t>(d)];
    }
    return sum;
  });
}

void expect_best_by_dot(const FilledCache& filled, const Choices& choices,
                        const std::vector<int>& channels = {}) {
  SelectorSession session(loki(), choices, filled, 1);
  session.observe_everything();
  const std::vector<uint8_t> q = gaussian_queries(filled.cache.spec(), 1, 1, 3);
  std::vector<Slots> want;
  for (int row = 0; row < filled.cache.num_rows(); ++row) {
    want.push_back(best_by_dot(filled, row, q, 40, channels));
  }
  expect_equal_but_for_the_cut(session.select(0, q), want);
}

// The axes are orthonormal, so on all of them nothing of q.k is missing.
TEST(LokiTest, RanksExactlyOnAllChannels) {
  expect_best_by_dot(make_cache(two_sequences()), {{"budget", "40"}, {"channels", "64"}});
}

// Keys in a space of 5 dimensions, which no channel alone shows: 5 components hold all of q.k.
TEST(LokiTest, FindsTheSpaceThatKeysLieIn) {
  FilledCache filled = make_cache(two_sequences());
  Random random(4);
  std::vector<double> basis(5 * 64);
  for (double& x : basis) x = random.normal();
  for (int b = 0; b < 2; ++b) {
    for (int t = 0; t < filled.k.count(b); ++t) {
      for (int h = 0; h < 2; ++h) {
        double at[5];
        for (double& x : at) x = random.normal();
        for (int d = 0; d < 64; ++d) {
          double x = 0.0;
          for (int i = 0; i < 5; ++i) x += at[i] * basis[static_cast<size_t>(i * 64 + d)];
          filled.k.set(b, t, h, d, static_cast<float>(x));
        }
      }
    }
  }
  expect_best_by_dot(filled, {{"budget", "40"}, {"channels", "5"}});
}

class LokiFileTest : public ::testing::Test {
 protected:
  // Axis i of every head is channel i + 7 * (head + 1), mod 64.
  void write(uint32_t layers, uint32_t heads, uint32_t dim, int64_t bytes_short = 0,
             std::vector<uint32_t> layer_numbers = {}) {
    layer_numbers.resize(layers);
    std::vector<float> numbers(size_t{layers} * heads * dim * 2);
    for (uint32_t row = 0; row < layers * heads; ++row) {
      for (uint32_t i = 0; i < dim; ++i) {
        for (uint32_t d = 0; d < dim; ++d) {
          numbers.push_back(d == (i + 7 * (row % heads + 1)) % dim ? 1.0f : 0.0f);
        }
      }
    }
    const uint32_t header[] = {layers, heads, dim, 0};
    std::ofstream out(path_, std::ios::binary);
    out.write("SIKVPCA1", 8).write(reinterpret_cast<const char*>(header), sizeof header);
    out.write(reinterpret_cast<const char*>(layer_numbers.data()), int64_t{layers} * 4);
    out.write(reinterpret_cast<const char*>(numbers.data()),
              static_cast<int64_t>(numbers.size()) * 4 - bytes_short);
  }
  std::string refusal() const {
    const FilledCache filled = make_cache(two_sequences());
    try {
      SelectorSession session(loki(), {{"pca", path_}}, filled, 1);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  TemporaryFolder folder_;
  std::string path_ = (folder_ / "keys.pca").string();
};

TEST_F(LokiFileTest, TakesTheAxesOfItsHead) {
  write(1, 2, 64);
  CacheSpec spec = two_sequences();
  const FilledCache filled = make_cache(spec);
  SelectorSession session(loki(), {{"budget", "40"}, {"channels", "3"}, {"pca", path_}}, filled, 1);
  session.observe_everything();
  const std::vector<uint8_t> q = gaussian_queries(spec, 1, 1, 3);
  const std::vector<Slots> rows = session.select(0, q);
  for (int row = 0; row < 4; ++row) {
    const int first = 7 * (row % 2 + 1);
    EXPECT_EQ(rows[static_cast<size_t>(row)],
              best_by_dot(filled, row, q, 40, {first, first + 1, first + 2}));
  }
}

TEST_F(LokiFileTest, RefusesFilesThatDoNotFit) {
  EXPECT_NE(refusal().find("cannot be opened"), std::string::npos) << refusal();
  write(2, 2, 64);
  EXPECT_NE(refusal().find("has 2 layers, the cache has 1"), std::string::npos) << refusal();
  write(1, 3, 64);
  EXPECT_NE(refusal().find("has 3 KV heads, the cache has 2"), std::string::npos) << refusal();
  write(1, 2, 32);
  EXPECT_NE(refusal().find("has 32 channels per head, the cache has 64"), std::string::npos);
  write(1, 2, 64, 4);
  EXPECT_NE(refusal().find("bytes, not the"), std::string::npos) << refusal();
  std::ofstream(path_) << "no such file";
  EXPECT_NE(refusal().find("does not begin with SIKVPCA1"), std::string::npos) << refusal();
  EXPECT_NE(refusal().find("sikv dataset pca"), std::string::npos) << refusal();
}

// A file's axes belong to the layers that it names, in their order.
TEST_F(LokiFileTest, RefusesTheAxesOfOtherLayers) {
  const auto made_for = [&](const std::vector<int>& layers) -> std::string {
    sikv_shape shape = make_shape(64, SIKV_FP16);
    shape.num_layers = 3;
    const Choices choices = {{"pca", path_}};
    try {
      SelectorInstance(loki(), OptionSet::parse(loki().options, choices, "loki"), shape,
                       cpu().info(), cpu().host(), nullptr, layers);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  write(3, 2, 64, 0, {0, 5, 11});
  EXPECT_EQ(made_for({0, 5, 11}), "");
  EXPECT_EQ(made_for({}), "");  // a cache of no model
  for (const auto& [layers, text] : {std::pair(std::vector{17, 23, 29}, "17,23,29"),
                                     {{0, 5, 12}, "0,5,12"},
                                     {{5, 0, 11}, "5,0,11"}}) {
    EXPECT_NE(made_for(layers).find(
                  "the PCA file '" + path_ + "' is of the model's layers 0,5,11, the cache has " +
                  text + "; `sikv dataset pca --layers " + text + "` writes one from a trace"),
              std::string::npos)
        << made_for(layers);
  }
}

// The axes of each row in fp32, and the first coordinates of its pages in the input type.
TEST(LokiTest, CountsWhatItKeepsAndReads) {
  CacheSpec spec = two_sequences();
  spec.dtype = SIKV_FP16;
  const FilledCache filled = make_cache(spec);
  SelectorSession session(loki(), {{"channels", "8"}}, filled, 3);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 4u * 64 * 8 * 4 + 2u * (512 + 256) * 8 * 2);
  session.select(0);
  session.select(1);
  const auto counters = counters_of(session);
  EXPECT_EQ(counters.at("runs"), 8.0);
  EXPECT_EQ(counters.at("scan_bytes"), 2.0 * (4 * 64 * 8 * 4 + 2 * (300 + 70) * 8 * 2));
  session.selector().begin_sequence(0);
  EXPECT_EQ(session.selector().state_bytes(), 2u * 64 * 8 * 4 + 2u * 256 * 8 * 2);
}

}  // namespace
}  // namespace sikv::testing
