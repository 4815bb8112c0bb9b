#include "framework/base/text.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

namespace sikv {
namespace {

const std::vector<std::string> kNames = {"self_index", "quest", "snapkv", "sparse_flash", "cpu"};

TEST(Nearest, FindsTypos) {
  EXPECT_EQ(nearest("qeust", kNames), "quest");           // swap
  EXPECT_EQ(nearest("selfindex", kNames), "self_index");  // delete
  EXPECT_EQ(nearest("snappkv", kNames), "snapkv");        // insert
  EXPECT_EQ(nearest("gpu", kNames), "cpu");               // replace
}

TEST(Nearest, IgnoresCaseAndDashes) { EXPECT_EQ(nearest("Self-Index", kNames), "self_index"); }

TEST(Nearest, StaysSilentWhenNothingIsNear) {
  EXPECT_EQ(nearest("magnitude_bits", kNames), std::nullopt);
  EXPECT_EQ(nearest("", kNames), std::nullopt);
  EXPECT_EQ(nearest("quest", {}), std::nullopt);
}

TEST(Nearest, EarlierCandidateWinsATie) {
  const std::vector<std::string> names = {"bits_a", "bits_b"};
  EXPECT_EQ(nearest("bits_c", names), "bits_a");
}

TEST(DidYouMean, EndsASentence) {
  EXPECT_EQ(did_you_mean("qest", kNames), "; did you mean 'quest'?");
  EXPECT_EQ(did_you_mean("unrelated_word", kNames), "");
}

TEST(BytesText, PicksTheUnit) {
  EXPECT_EQ(bytes_text(0), "0 B");
  EXPECT_EQ(bytes_text(1023), "1023 B");
  EXPECT_EQ(bytes_text(1024), "1.00 KiB");
  EXPECT_EQ(bytes_text((5ull << 30) / 4), "1.25 GiB");
  EXPECT_EQ(bytes_text((1ull << 20) - 1), "1.00 MiB");
  EXPECT_EQ(bytes_text(std::numeric_limits<uint64_t>::max()), "16.00 EiB");
}

TEST(DurationText, PicksTheUnit) {
  EXPECT_EQ(duration_text(0), "0 s");
  EXPECT_EQ(duration_text(12.34e-6), "12.3 us");
  EXPECT_EQ(duration_text(2e-9), "2.00 ns");
  EXPECT_EQ(duration_text(0.9999), "1.00 s");
  EXPECT_EQ(duration_text(0.1234), "123 ms");
  EXPECT_EQ(duration_text(1.5), "1.50 s");
  EXPECT_EQ(duration_text(59.9), "59.9 s");
  EXPECT_EQ(duration_text(59.99), "1 min 00 s");
  EXPECT_EQ(duration_text(125), "2 min 05 s");
  EXPECT_EQ(duration_text(3720), "1 h 02 min");
  EXPECT_EQ(duration_text(-1.5), "-1.50 s");
  EXPECT_EQ(duration_text(std::numeric_limits<double>::infinity()), "inf");
}

TEST(Join, SeparatesParts) {
  EXPECT_EQ(join(std::vector<std::string>{"a", "b", "c"}), "a, b, c");
  EXPECT_EQ(join(std::vector<std::string>{"a", "b"}, " | "), "a | b");
  EXPECT_EQ(join({}), "");
}

}  // namespace
}  // namespace sikv
