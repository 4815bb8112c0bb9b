#include "kernels/common/flash_state.h"

#include <gtest/gtest.h>

#include <vector>

namespace sikv {
namespace {

constexpr int kDim = 2;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

class FlashStateTest : public ::testing::Test {
 protected:
  FlashState make() {
    storage_.emplace_back(FlashState::floats(kDim), NAN);
    FlashState state(storage_.back().data(), kDim);
    state.reset();
    return state;
  }
  // {out 0, out 1, lse}
  static std::vector<float> finish(const FlashState& state) {
    std::vector<float> result(3);
    result[2] = state.finish(result.data());
    return result;
  }
  static void expect_near(const std::vector<float>& a, const std::vector<float>& b) {
    for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-6f);
  }

 private:
  std::vector<std::vector<float>> storage_;
};

constexpr float kX[] = {1, -2}, kY[] = {5, 4}, kZ[] = {-3, 0};

TEST_F(FlashStateTest, IsASoftmax) {
  FlashState state = make();
  state.add(std::log(1.0f), kX);
  state.add(std::log(2.0f), kY);
  state.add(std::log(5.0f), kZ);
  expect_near(finish(state), {(1 + 2 * 5 + 5 * -3) / 8.0f, (-2 + 2 * 4) / 8.0f, std::log(8.0f)});
}

TEST_F(FlashStateTest, TakesLogitsOfAnySizeInAnyOrder) {
  for (const float offset : {-3e4f, 3e4f}) {
    FlashState up = make(), down = make();
    up.add(offset - 200, kX), up.add(offset, kY);
    down.add(offset, kY), down.add(offset - 200, kX);
    expect_near(finish(up), {5, 4, offset});
    expect_near(finish(down), {5, 4, offset});
  }
}

TEST_F(FlashStateTest, MergesParts) {
  FlashState whole = make(), left = make(), right = make();
  whole.add(1, kX), whole.add(2, kY), whole.add(3, kZ);
  left.add(1, kX);
  right.add(2, kY), right.add(3, kZ);
  left.merge(right);
  expect_near(finish(left), finish(whole));
}

TEST_F(FlashStateTest, IsNothingWithoutTokens) {
  FlashState empty = make(), other = make(), full = make();
  EXPECT_EQ(finish(empty), std::vector<float>({0, 0, -kInfinity}));
  empty.merge(other);
  empty.add(-kInfinity, kX);
  EXPECT_TRUE(empty.empty());
  EXPECT_EQ(finish(empty), std::vector<float>({0, 0, -kInfinity}));
  full.add(2, kX);
  full.merge(empty);
  EXPECT_EQ(finish(full), std::vector<float>({1, -2, 2}));
  empty.merge(full);
  EXPECT_EQ(finish(empty), std::vector<float>({1, -2, 2}));
}

TEST_F(FlashStateTest, ShiftsLogitsAndValuesOfATokenSoFar) {
  FlashState shifted = make(), direct = make();
  shifted.add(1, kX), shifted.add(2, kY);
  shifted.shift_logits(10);
  for (int d = 0; d < kDim; ++d) shifted.acc()[d] += shifted.sum() * 7;
  const float x[] = {8, 5}, y[] = {12, 11};
  direct.add(11, x), direct.add(12, y);
  expect_near(finish(shifted), finish(direct));
}

TEST_F(FlashStateTest, DoesNotSwallowNaN) {
  FlashState state = make();
  state.add(1, kX), state.add(NAN, kY);
  EXPECT_TRUE(std::isnan(finish(state)[0]));
}

}  // namespace
}  // namespace sikv
