#include <gtest/gtest.h>

#include <numeric>

#include "selectors/pyramidkv/pyramidkv.h"
#include "tests/support/evictions.h"

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

}  // namespace
}  // namespace sikv::testing
