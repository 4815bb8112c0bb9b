#include "framework/model/passkey.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "framework/base/error.h"

namespace sikv {
namespace {

TEST(Passkey, PromptHasItsLengthAndTheKeyAtItsDepth) {
  const Tokenizer tokenizer(
      read_model(std::string(SIKV_SOURCE_DIR) + "/datasets/tiny/llama.h5").vocabulary);
  const auto haystack = tokenizer.encode(std::string(1000, '.'));
  for (const double depth : {0.0, 0.5, 1.0}) {
    const PasskeyPrompt prompt = passkey_prompt(tokenizer, haystack, 500, depth, 7);
    EXPECT_EQ(prompt.key.size(), 5u);
    EXPECT_EQ(prompt.tokens.size(), 500u);
    const std::string text = tokenizer.decode(prompt.tokens);
    const size_t before = text.find("\n\nThe pass key is " + prompt.key);
    const size_t after = text.find("is the pass key.\n\n");
    ASSERT_NE(before, std::string::npos) << text;
    ASSERT_NE(after, std::string::npos);
    EXPECT_TRUE(text.ends_with("The pass key is"));
    const double dots = static_cast<double>(std::count(text.begin(), text.end(), '.')) - 2;
    EXPECT_NEAR(static_cast<double>(before) / dots, depth, 0.05);
  }
  EXPECT_NE(passkey_prompt(tokenizer, haystack, 500, 0, 7).key,
            passkey_prompt(tokenizer, haystack, 500, 0, 8).key);
  EXPECT_THROW(passkey_prompt(tokenizer, haystack, 10, 0, 7), Error);
  EXPECT_THROW(passkey_prompt(tokenizer, haystack, 5000, 0, 7), Error);
}

}  // namespace
}  // namespace sikv
