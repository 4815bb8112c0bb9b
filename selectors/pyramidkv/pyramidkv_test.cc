#include <gtest/gtest.h>

#include <numeric>

#include "selectors/pyramidkv/pyramidkv.h"
#include "tests/support/evictions.h"
#include "tests/support/replay.h"

namespace sikv::testing {
namespace {

TEST(PyramidKvTest, SharesFallAndSumToTheTotal) {
  for (const int layers : {1, 2, 3, 6, 30, 32}) {
    for (const int64_t share : {0, 1, 7, 64, 992}) {
      for (const int64_t competing : {share + 1, share * 3 / 2 + 2, int64_t{4000}}) {
        for (const double beta : {1.0, 2.0, 20.0}) {
          SCOPED_TRACE(std::to_string(layers) + " layers, " + std::to_string(share) + " of " +
                       std::to_string(competing));
          const std::vector<int64_t> shares =
              pyramidkv::layer_shares(layers, share, competing, beta);
          EXPECT_EQ(std::accumulate(shares.begin(), shares.end(), int64_t{0}), layers * share);
          for (size_t layer = 0; layer < shares.size(); ++layer) {
            EXPECT_GE(shares[layer], 0);
            EXPECT_LE(shares[layer], competing);
            if (layer > 0) {
              EXPECT_LE(shares[layer], shares[layer - 1] + 1);
            }
          }
        }
      }
    }
  }
  // The paper's numbers: 64 and beta 20 over 4 layers, 124.8 down to 3.2.
  EXPECT_EQ(pyramidkv::layer_shares(4, 64, 4000, 20), (std::vector<int64_t>{125, 84, 44, 3}));
}

TEST(PyramidKvTest, KeepsWhatSnapKvKeepsOfTheLayersBudget) {
  const CacheSpec spec{.num_kv_heads = 2, .encoded = {512}, .tail = {40}, .pinned = 5};
  const sikv_shape shape = tight_shape(spec, 2);
  const FilledCache filled(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                           make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
  // One layer gets the mean; the window lies in the tail.
  for (const char* variant : {"ref", "cpu"}) {
    EXPECT_EQ(kept_after_prompt(find_variant(SIKV_SELECTOR, "pyramidkv", variant),
                                {{"budget", "90"}, {"window", "4"}}, filled, 2),
              kept_after_prompt(find_variant(SIKV_SELECTOR, "snapkv", variant),
                                {{"budget", "90"}, {"window", "4"}}, filled, 2));
  }
}

// Tokens in pages that each head of each of 3 layers has left of a prompt; the window is in the tail.
std::vector<size_t> lengths(int prompt, const std::string& selector) {
  const Replay replay(prompt, 1, 7, 3);
  std::vector<size_t> lengths;
  for (const auto& positions : replay.run(selector, 32).positions) {
    lengths.push_back(positions.size());
  }
  return lengths;
}

TEST(PyramidKvTest, LayersOfACacheHaveTheirShares) {
  const std::vector<int64_t> shares = pyramidkv::layer_shares(3, 90, 512, 20);
  ASSERT_GT(shares[0], shares[1]);
  ASSERT_GT(shares[1], shares[2]);
  std::vector<size_t> want;
  for (const int64_t share : shares)
    want.insert(want.end(), Replay::kHeads, static_cast<size_t>(share));
  EXPECT_EQ(lengths(552, "pyramidkv(budget=90,pinned=0)"), want);
}

// As the source does: 552 tokens are fewer than twice 300.
TEST(PyramidKvTest, AShortPromptHasNoPyramid) {
  EXPECT_EQ(lengths(552, "pyramidkv(budget=300,pinned=0)"),
            std::vector<size_t>(3 * Replay::kHeads, 300));
}

}  // namespace
}  // namespace sikv::testing
