#include "framework/model/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "framework/base/error.h"

namespace sikv {
namespace {

TEST(Rope, RotatesPairsHalfAHeadApart) {
  const Rope rope(64, 10000, "");
  EXPECT_EQ(rope.frequencies()[0], 1);
  EXPECT_NEAR(rope.frequencies()[16], 0.01, 1e-12);
  std::vector<float> turn(64), x(64, 0.0f);
  rope.turn(3, turn.data());
  x[16] = 1;
  Rope::rotate(turn.data(), 1, 64, x.data());
  EXPECT_NEAR(x[16], std::cos(0.03), 1e-7);
  EXPECT_NEAR(x[48], std::sin(0.03), 1e-7);
}

// 1e6 positions: the angle in fp32 would be off by 0.03 rad.
TEST(Rope, AnglesStayExactFarOut) {
  const Rope rope(64, 500000, "");
  std::vector<float> turn(64);
  rope.turn(1000003, turn.data());
  EXPECT_NEAR(turn[0], std::cos(1000003.0), 1e-6);
}

TEST(Rope, ScalingRulesOfHuggingFace) {
  const Rope plain(64, 500000, "");
  const Rope linear(64, 500000, R"({"rope_type": "linear", "factor": 4.0})");
  EXPECT_NEAR(linear.frequencies()[5], plain.frequencies()[5] / 4, 1e-15);

  const Rope llama3(64, 500000,
                    R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})");
  EXPECT_EQ(llama3.frequencies()[0], plain.frequencies()[0]);
  EXPECT_NEAR(llama3.frequencies()[31], plain.frequencies()[31] / 8, 1e-18);
  EXPECT_EQ(llama3.magnitude(), 1);

  const Rope yarn(64, 1e6, R"({"rope_type": "yarn", "factor": 4.0,
                               "original_max_position_embeddings": 32768})");
  EXPECT_NEAR(yarn.magnitude(), 0.1 * std::log(4.0) + 1, 1e-12);
  EXPECT_EQ(yarn.frequencies()[0], 1);
}

TEST(Rope, UnknownOrIncompleteRulesAreRefused) {
  const auto refusal = [](const char* text) -> std::string {
    try {
      Rope(64, 10000, text);
      return "";
    } catch (const Error& error) {
      return error.what();
    }
  };
  EXPECT_NE(refusal(R"({"rope_type": "longrope"})").find("'longrope' is not supported"),
            std::string::npos);
  EXPECT_NE(refusal("not json").find("must be a JSON object"), std::string::npos);
  EXPECT_NE(refusal("[]").find("must be a JSON object"), std::string::npos);
  EXPECT_NE(refusal(R"({"rope_type": "linear"})").find("positive 'factor'"), std::string::npos);
  EXPECT_NE(refusal(R"({"rope_type": "factors", "factors": [1]})").find("32 positive"),
            std::string::npos);
}

}  // namespace
}  // namespace sikv
