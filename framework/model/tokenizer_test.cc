#include "framework/model/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "framework/base/error.h"
#include "framework/base/random.h"

namespace sikv {
namespace {

std::string tiny(const std::string& name) {
  return std::string(SIKV_SOURCE_DIR) + "/datasets/tiny/" + name;
}

Vocabulary vocabulary(const std::string& model = "llama") {
  return read_model(tiny(model + ".h5")).vocabulary;
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

// What the tokenizers library gives, for awkward texts and every pre-tokenizer.
TEST(Tokenizer, MatchesTheGoldenAndComesBack) {
  std::ifstream stream(tiny("tokenizer_golden.json"));
  const auto golden = nlohmann::json::parse(stream);
  Vocabulary words = vocabulary();
  for (const char* rule : {"smollm", "gpt-2", "llama-bpe", "qwen2"}) {
    words.pre_tokenizer = rule;
    const Tokenizer tokenizer(words);
    ASSERT_EQ(golden["texts"].size(), golden[rule].size());
    for (size_t i = 0; i < golden["texts"].size(); ++i) {
      const std::string text = golden["texts"][i];
      const auto tokens = tokenizer.encode(text);
      EXPECT_EQ(tokens, golden[rule][i].get<std::vector<int32_t>>()) << rule << ": " << text;
      EXPECT_EQ(tokenizer.decode(tokens), text) << rule;
    }
  }
}

TEST(Tokenizer, AnyUnicodeTextComesBack) {
  Random random(1);
  for (const char* rule : {"smollm", "gpt-2", "llama-bpe", "qwen2"}) {
    Vocabulary words = vocabulary();
    words.pre_tokenizer = rule;
    const Tokenizer tokenizer(words);
    for (int round = 0; round < 50; ++round) {
      std::string text;
      for (uint64_t i = 0, n = random.below(60); i < n; ++i) {
        // ASCII, spaces and letters twice as often as the rest of Unicode.
        const uint64_t kind = random.below(5);
        uint32_t point = static_cast<uint32_t>(kind == 0   ? random.below(0x80)
                                               : kind == 1 ? 0x20
                                               : kind == 2 ? 0x61 + random.below(26)
                                               : kind == 3 ? 0x80 + random.below(0x2000)
                                                           : 0x80 + random.below(0x10ff80));
        if (point >= 0xd800 && point < 0xe000) point = 0x1f600;
        if (point < 0x80) {
          text += static_cast<char>(point);
        } else if (point < 0x800) {
          text += {static_cast<char>(0xc0 | point >> 6), static_cast<char>(0x80 | (point & 0x3f))};
        } else if (point < 0x10000) {
          text +=
              {static_cast<char>(0xe0 | point >> 12), static_cast<char>(0x80 | (point >> 6 & 0x3f)),
               static_cast<char>(0x80 | (point & 0x3f))};
        } else {
          text += {static_cast<char>(0xf0 | point >> 18),
                   static_cast<char>(0x80 | (point >> 12 & 0x3f)),
                   static_cast<char>(0x80 | (point >> 6 & 0x3f)),
                   static_cast<char>(0x80 | (point & 0x3f))};
        }
      }
      EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text) << rule;
    }
  }
}

// Rules by hand: which words there are shows in where merges stop. "th" and "the" are merges of the
// tiny vocabulary.
TEST(Tokenizer, MergesStayWithinWords) {
  const Tokenizer tokenizer(vocabulary());
  const auto the = tokenizer.encode("the");
  EXPECT_EQ(the.size(), 1u);
  EXPECT_EQ(tokenizer.encode("t1he").size(), 3u + (tokenizer.encode("he").size() - 1));
  EXPECT_EQ(tokenizer.encode("12").size(), 2u);
  EXPECT_TRUE(tokenizer.encode("").empty());
}

// A word as long as a file: merging must not take the square of its length.
TEST(Tokenizer, LongWordsAreFast) {
  const Tokenizer tokenizer(vocabulary());
  std::string text;
  while (text.size() < 600000) text += "the";
  const auto tokens = tokenizer.encode(text);
  EXPECT_EQ(tokenizer.decode(tokens), text);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(std::string(300000, ' '))).size(), 300000u);
}

TEST(Tokenizer, SpecialTokensAreParsedWhenAsked) {
  const Vocabulary words = vocabulary();
  const std::string name = words.tokens[1];
  ASSERT_EQ(words.types[1], TokenType::kControl);
  const Tokenizer tokenizer(words);
  const std::string text = "the" + name + name + " the";
  const auto parsed = tokenizer.encode(text, SpecialTokens::kParsed);
  const auto the = tokenizer.encode("the"), space_the = tokenizer.encode(" the");
  std::vector<int32_t> expected = the;
  expected.insert(expected.end(), {1, 1});
  expected.insert(expected.end(), space_the.begin(), space_the.end());
  EXPECT_EQ(parsed, expected);
  const auto plain = tokenizer.encode(text);
  EXPECT_EQ(std::count(plain.begin(), plain.end(), 1), 0);
  EXPECT_EQ(tokenizer.decode(parsed), text);
  EXPECT_EQ(tokenizer.decode(plain), text);
}

TEST(Tokenizer, NamesWhatIsWrong) {
  const Tokenizer tokenizer(vocabulary());
  for (const std::string text :
       {"ab\xff", "ab\xc3", "ab\xe4\xb8", "ab\xc0\x80", "ab\xed\xa0\x80", "ab\xf4\x90\x80\x80"}) {
    EXPECT_NE(refusal([&] { tokenizer.encode(text); }).find("not UTF-8 at byte 2"),
              std::string::npos);
  }
  EXPECT_NE(refusal([&] { tokenizer.decode(std::vector<int32_t>{300}); }).find("token 300"),
            std::string::npos);

  Vocabulary other = vocabulary();
  other.pre_tokenizer = "deepseek";
  EXPECT_NE(
      refusal([&] { Tokenizer{other}; }).find("'deepseek' is not supported; there are smollm"),
      std::string::npos);
  other.pre_tokenizer = "";
  EXPECT_NE(refusal([&] { Tokenizer{other}; }).find("no vocabulary"), std::string::npos);

  Vocabulary broken = vocabulary();
  broken.merges.push_back("nothere x");
  EXPECT_NE(refusal([&] { Tokenizer{broken}; }).find("is missing"), std::string::npos);

  Vocabulary lacking = vocabulary();
  for (std::string& token : lacking.tokens) {
    if (token == "~") token = "(gone)";
  }
  const Tokenizer without(lacking);
  EXPECT_NE(refusal([&] { without.encode("a ~ b"); }).find("no token for the byte 0x7e"),
            std::string::npos);
}

}  // namespace
}  // namespace sikv
