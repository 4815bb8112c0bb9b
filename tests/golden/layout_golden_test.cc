// Pins the bytes of every layout; tests/golden/README.md says how to regenerate the files.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

#include "framework/base/error.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

constexpr int kDim = 64;
constexpr int kPrompt = 40;
constexpr int kShownTokens = 8;   // one tile of nibbles
constexpr int kShownFloats = 24;  // of each side table

// sign4(magnitude_bits=2,scale_group=32,scale=fp16).v1
std::string printed(const sikv_layout& layout) {
  std::string text = layout.family;
  const char* separator = "(";
  for (uint32_t i = 0; i < layout.num_params; ++i) {
    text.append(separator).append(layout.params[i].name).append("=").append(layout.params[i].value);
    separator = ",";
  }
  return text + ").v" + std::to_string(layout.version);
}

std::string hex(const uint8_t* bytes, int64_t count) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (int64_t i = 0; i < count; ++i) {
    if (i != 0 && i % 32 == 0) text += "\n   ";
    text += kDigits[bytes[i] >> 4];
    text += kDigits[bytes[i] & 15];
  }
  return text;
}

std::string_view plane_name(uint32_t role) {
  constexpr std::string_view kNames[] = {"",      "index_code", "magnitude",
                                         "scale", "value_code", "value_scale"};
  return kNames[role];
}

std::string_view table_name(uint32_t role) {
  constexpr std::string_view kNames[] = {"", "codebook", "key_mean", "key_scale", "value_mean"};
  return kNames[role];
}

// The section of one layout, headed by its printed form.
std::string section(CodecInstance& codec, int32_t dtype) {
  const sikv_layout layout = codec.describe();
  const Variant& variant = codec.variant();
  const bool key = variant.kind == SIKV_KEY_CODEC;
  TestRows rows({kPrompt}, 1, kDim, dtype);
  rows.fill(Pattern::kSteps, 0);
  TestCache cache({.num_kv_heads = 1, .head_dim = kDim, .dtype = dtype, .encoded = {kPrompt}},
                  key ? layout : sikv_layout{}, key ? sikv_layout{} : layout);
  fit_and_encode(codec, rows, cache);

  std::string text = printed(layout) + "\n";
  for (uint32_t i = 0; i < layout.num_planes; ++i) {
    const sikv_plane& plane = layout.planes[i];
    const uint32_t tiles = (kShownTokens + plane.tile_tokens - 1) / plane.tile_tokens;
    const uint8_t* page = cache.page(variant.kind, static_cast<sikv_role>(plane.role), 0, 0);
    text.append(plane_name(plane.role)).append("\n");
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      text += "  " + std::to_string(tile * plane.tile_tokens) + ": " +
              hex(page + tile * sikv_tile_stride(&layout, i), plane.bytes_per_tile) + "\n";
    }
  }
  for (uint32_t i = 0; i < layout.num_tables; ++i) {
    const sikv_side_table& side = layout.tables[i];
    const float* table = cache.table(variant.kind, static_cast<sikv_table_role>(side.role), 0);
    text.append(table_name(side.role)).append("\n   ");
    for (int f = 0; f < std::min(kShownFloats, static_cast<int>(side.count)); ++f) {
      char word[16];
      std::snprintf(word, sizeof word, " %08x", sikv_float_bits(table[f]));
      text.append(f != 0 && f % 8 == 0 ? "\n   " : "").append(word);
    }
    text += "\n";
  }
  return text;
}

std::string difference(const std::string& expected, const std::string& actual) {
  std::istringstream old_lines(expected), new_lines(actual);
  std::string text, old_line, new_line;
  for (int number = 1;; ++number) {
    const bool has_old = static_cast<bool>(std::getline(old_lines, old_line));
    const bool has_new = static_cast<bool>(std::getline(new_lines, new_line));
    if (!has_old && !has_new) return text;
    if (has_old == has_new && old_line == new_line) continue;
    text += "line " + std::to_string(number) + "\n";
    if (has_old) text.append("- ").append(old_line).append("\n");
    if (has_new) text.append("+ ").append(new_line).append("\n");
  }
}

// Every layout that the options and input types of a codec lead to, once.
std::string make_golden(const Variant& variant) {
  std::string text;
  std::set<std::string> seen;
  for (const Choices& choices : single_choices(variant)) {
    for (const int32_t dtype : {SIKV_FP32, SIKV_FP16, SIKV_BF16}) {
      try {
        CodecInstance codec =
            make_instance<CodecInstance>(variant, choices, make_shape(kDim, dtype, 1));
        if (seen.insert(printed(codec.describe())).second) text += section(codec, dtype) + "\n";
      } catch (const Error& error) {  // a scale group wider than kDim
        EXPECT_NE(std::string(error.what()).find("does not divide"), std::string::npos)
            << error.what();
      }
    }
  }
  return text;
}

class LayoutGoldenTest : public ::testing::TestWithParam<const Variant*> {};

std::string name_of(const Variant& variant) {
  return std::string(variant.kind == SIKV_KEY_CODEC ? "key_" : "value_").append(variant.id);
}

TEST_P(LayoutGoldenTest, BytesAreTheGoldenOnes) {
  const std::string actual = make_golden(*GetParam());
  const std::string path =
      std::string(SIKV_GOLDEN_FOLDER).append("/").append(name_of(*GetParam())).append(".txt");
  if (std::getenv("SIKV_REGENERATE_GOLDEN") != nullptr) std::ofstream(path) << actual;
  std::ifstream file(path);
  ASSERT_TRUE(file) << path << " is missing; see tests/golden/README.md";
  std::ostringstream expected;
  expected << file.rdbuf();
  EXPECT_EQ(difference(expected.str(), actual), "") << path;
}

std::vector<const Variant*> ref_codecs() {
  std::vector<const Variant*> codecs;
  for (const Variant& variant : registry().variants()) {
    const bool is_codec = variant.kind == SIKV_KEY_CODEC || variant.kind == SIKV_VALUE_CODEC;
    if (is_codec && variant.variant == "ref") codecs.push_back(&variant);
  }
  return codecs;
}

INSTANTIATE_TEST_SUITE_P(Codecs, LayoutGoldenTest, ::testing::ValuesIn(ref_codecs()),
                         [](const auto& info) { return name_of(*info.param); });

}  // namespace
}  // namespace sikv::testing
