#include <gtest/gtest.h>

#include <vector>

#include "framework/base/error.h"
#include "framework/pipeline/pin.h"

namespace sikv {
namespace {

// One sequence, one KV head, two query heads; key t = x_t on channel 0.
struct Prompt {
  std::vector<float> keys, queries;
  int32_t first = 0, count;
  sikv_rows rows;

  Prompt(std::vector<float> x, float query) : count(static_cast<int32_t>(x.size())) {
    for (float value : x) {
      keys.push_back(value);
      keys.push_back(0.0f);
    }
    queries = {query * 0.5f, 0.0f, query * 1.5f, 0.0f};
    rows = {keys.data(), SIKV_FP32, count, &first, &count, 2, 2};
  }
  PinInput input(int encoded) const {
    return {rows, 0, 0, encoded, queries.data(), 1, 2, 1, 2, 1.0f};
  }
};

TEST(Pin, LastQueryTakesTheHighestDotProductsAmongTheEncoded) {
  const Prompt prompt({1, 5, 2, 5, 9, 100}, 1.0f);
  EXPECT_EQ(choose_pinned(PinRule::kLastQuery, 3, prompt.input(5)),
            (std::vector<int32_t>{1, 3, 4}));
  // Ties to the lower position; no more than there are.
  EXPECT_EQ(choose_pinned(PinRule::kLastQuery, 2, prompt.input(4)), (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(choose_pinned(PinRule::kLastQuery, 1, prompt.input(4)), (std::vector<int32_t>{1}));
  EXPECT_EQ(choose_pinned(PinRule::kLastQuery, 9, prompt.input(2)), (std::vector<int32_t>{0, 1}));
}

TEST(Pin, FirstTakesThePrefix) {
  const Prompt prompt({1, 5, 2}, 1.0f);
  EXPECT_EQ(choose_pinned(PinRule::kFirst, 2, prompt.input(3)), (std::vector<int32_t>{0, 1}));
}

TEST(Pin, SnapKvPoolsOverSevenPositions) {
  std::vector<float> x(20, 0.0f);
  x[8] = 10.0f;
  const Prompt prompt(x, 1.0f);
  // The peak at 8 spreads over 5 .. 11; ties go to the lower positions.
  EXPECT_EQ(choose_pinned(PinRule::kSnapKv, 7, prompt.input(20)),
            (std::vector<int32_t>{5, 6, 7, 8, 9, 10, 11}));
}

TEST(Pin, WithoutQueriesTheRemedyIsNamed) {
  const Prompt prompt({1, 5, 2}, 1.0f);
  PinInput input = prompt.input(3);
  input.num_queries = 0;
  EXPECT_THROW(choose_pinned(PinRule::kLastQuery, 2, input), Error);
  EXPECT_EQ(choose_pinned(PinRule::kFirst, 1, input).size(), 1u);
}

}  // namespace
}  // namespace sikv
