#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "framework/base/random.h"
#include "plugins/layouts/kvquant_v1.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

// ---- one token ----------------------------------------------------------------------------------

// A page of one token; ranges of keys are [-1, 1] in every channel.
struct Token {
  explicit Token(int bits, std::vector<float> numbers = {}) : p{64, bits}, levels(1u << bits) {
    if (numbers.empty()) {
      for (size_t i = 0; i < levels.size(); ++i) {
        levels[i] = -1.0f + 2.0f * static_cast<float>(i) / static_cast<float>(levels.size() - 1);
      }
    } else {
      levels = std::move(numbers);
    }
  }
  kvquant::Page page() { return {code.data(), scale.data()}; }
  kvquant::KeyTables tables() const { return {levels.data(), centre.data(), half.data()}; }

  std::vector<float> as_key(const std::vector<float>& x) {
    std::vector<float> decoded(x.size());
    kvquant::pack_1(p, page(), 0, tables(), x.data());
    kvquant::unpack_1(p, page(), 0, tables(), decoded.data());
    return decoded;
  }
  std::vector<float> as_value(const std::vector<float>& x) {
    std::vector<float> decoded(x.size());
    kvquant::pack_1(p, page(), 0, levels.data(), x.data());
    kvquant::unpack_1(p, page(), 0, levels.data(), decoded.data());
    return decoded;
  }

  kvquant::Params p;
  std::vector<float> levels;
  std::vector<float> centre = std::vector<float>(256, 0.0f), half = std::vector<float>(256, 1.0f);
  std::vector<uint8_t> code = std::vector<uint8_t>(256), scale = std::vector<uint8_t>(256);
};

TEST(KvquantLayoutTest, EveryNumberGetsItsNearestLevel) {
  Token token(3, {-1.0f, -0.5f, -0.2f, -0.1f, 0.0f, 0.15f, 0.4f, 0.95f});
  std::vector<float> x(64);
  for (int d = 0; d < 64; ++d) x[static_cast<size_t>(d)] = -0.95f + 0.03f * static_cast<float>(d);
  const std::vector<float> decoded = token.as_key(x);
  const int kept = token.scale[0];
  for (int d = 0; d < 64; ++d) {
    if (d == kept) continue;
    const auto at = static_cast<size_t>(d);
    float nearest = token.levels[0];
    for (const float level : token.levels) {
      if (std::fabs(level - x[at]) < std::fabs(nearest - x[at])) nearest = level;
    }
    EXPECT_EQ(decoded[at], nearest) << d;
  }
}

TEST(KvquantLayoutTest, ALevelIsTakenAsOftenAsItsMidpointsSay) {
  Token token(2, {-1.0f, 0.0f, 0.5f, 1.0f});
  std::vector<float> x(64, 0.25f);  // the midpoint itself: the lower level
  x[1] = 0.2501f;
  x[2] = -0.5f;
  x[3] = -0.4999f;
  x[63] = 9.0f;  // the entry
  const std::vector<float> decoded = token.as_key(x);
  EXPECT_EQ(decoded[0], 0.0f);
  EXPECT_EQ(decoded[1], 0.5f);
  EXPECT_EQ(decoded[2], -1.0f);
  EXPECT_EQ(decoded[3], 0.0f);
}

TEST(KvquantLayoutTest, OutliersComeBackAsTheirFp16) {
  Token token(2);
  token.p.head_dim = 128;
  std::vector<float> x(128, 0.1f);
  x[17] = 7.3f;
  x[90] = -1234.567f;
  const auto half = [](float number) { return sikv_fp16_to_float(sikv_float_to_fp16(number)); };
  for (const std::vector<float>& decoded : {token.as_key(x), token.as_value(x)}) {
    EXPECT_EQ(decoded[17], half(7.3f));
    EXPECT_EQ(decoded[90], half(-1234.567f));
  }
}

TEST(KvquantLayoutTest, EntriesHaveTheirChannelThenAnFp16) {
  Token token(2);
  std::vector<float> x(64);
  x[5] = 2.0f;  // 0x4000
  token.as_key(x);
  EXPECT_EQ(token.scale[0], 5);
  EXPECT_EQ(token.scale[1], 0x00);
  EXPECT_EQ(token.scale[2], 0x40);
  token.as_value(x);
  EXPECT_EQ(token.scale[4], 5);
  EXPECT_EQ(token.scale[6], 0x40);
}

TEST(KvquantLayoutTest, MoreOutliersThanEntriesKeepTheLargest) {
  Token token(3);
  token.p.head_dim = 128;  // two entries
  std::vector<float> x(128, 0.25f);
  x[3] = 2.0f, x[40] = -5.0f, x[77] = 3.0f, x[100] = -1.5f;
  const std::vector<float> decoded = token.as_key(x);
  EXPECT_EQ(decoded[40], -5.0f);
  EXPECT_EQ(decoded[77], 3.0f);
  EXPECT_EQ(decoded[3], 1.0f);  // the others clamp
  EXPECT_EQ(decoded[100], -1.0f);
}

// Furthest in the units of the key, not of its channel's range: that is what a logit feels.
TEST(KvquantLayoutTest, EntriesGoByTheDistanceFromTheRange) {
  Token token(3);
  std::vector<float> x(64);
  token.half[7] = 0.01f;
  x[7] = 0.5f;  // 50 times its range, 0.49 outside
  token.half[9] = 10.0f;
  x[9] = -11.0f;  // 1 outside
  EXPECT_EQ(token.as_key(x)[9], -11.0f);
  EXPECT_EQ(token.scale[0], 9);
}

TEST(KvquantLayoutTest, TheRangeOfAValueIsTheNarrowestWithoutTheEntries) {
  std::vector<float> x(128, 0.5f);
  x[3] = -1.0f, x[90] = -9.0f, x[91] = -8.0f, x[127] = 0.75f;
  kvquant::Extent extent = kvquant::narrowest({128, 2}, x.data());  // without -9 and -8
  EXPECT_EQ(extent.lowest, -1.0f);
  EXPECT_EQ(extent.highest, 0.75f);
  x[64] = 30.0f;  // without that and -9
  extent = kvquant::narrowest({128, 2}, x.data());
  EXPECT_EQ(extent.lowest, -8.0f);
  EXPECT_EQ(extent.highest, 0.75f);
  Random random(3);
  for (const int head_dim : {64, 96, 128, 256}) {
    const kvquant::Params p{head_dim, 2};
    for (int i = 0; i < 20; ++i) {
      std::vector<float> row(static_cast<size_t>(head_dim));
      for (float& number : row) number = static_cast<float>(random.normal());
      extent = kvquant::narrowest(p, row.data());
      std::sort(row.begin(), row.end());
      const int kept = head_dim - kvquant::num_entries(p);
      float width = HUGE_VALF;
      for (size_t first = 0; first + static_cast<size_t>(kept) <= row.size(); ++first) {
        width = std::min(width, row[first + static_cast<size_t>(kept) - 1] - row[first]);
      }
      EXPECT_EQ(extent.highest - extent.lowest, width);
    }
  }
}

// So nothing of a value clamps: what is outside of its range are the entries.
TEST(KvquantLayoutTest, NumbersOfAValueOutsideOfItsRangeAreEntries) {
  Token token(5);
  Random random(5);
  std::vector<float> x(64);
  for (float& number : x) number = static_cast<float>(random.normal());
  const kvquant::Extent extent = kvquant::narrowest(token.p, x.data());
  const std::vector<float> decoded = token.as_value(x);
  const float most = kvquant::half_of(extent) / 31 +
                     1e-3f * kvquant::half_of(extent);  // half a step, fp16 of the range
  for (size_t d = 0; d < 64; ++d) EXPECT_NEAR(decoded[d], x[d], most) << d;
}

// ---- the codec ----------------------------------------------------------------------------------

float laplace(Random& random) {
  const double u = random.uniform() - 0.5;
  return static_cast<float>((u < 0 ? 1 : -1) * std::log1p(-2 * std::fabs(u) * 0.999999));
}

struct Encoded {
  Encoded(sikv_kind kind, int bits, int tokens, int head_dim,
          const std::function<float(int, int)>& number)
      : kind(kind),
        codec(make_codec(kind, "kvquant", {{"bits", std::to_string(bits)}},
                         make_shape(head_dim, SIKV_FP32, 1))),
        rows({tokens}, 1, head_dim, SIKV_FP32),
        cache({.num_kv_heads = 1, .head_dim = head_dim, .dtype = SIKV_FP32, .encoded = {tokens}},
              kind == SIKV_KEY_CODEC ? codec.describe() : sikv_layout{},
              kind == SIKV_KEY_CODEC ? sikv_layout{} : codec.describe()) {
    for (int t = 0; t < tokens; ++t) {
      for (int d = 0; d < head_dim; ++d) rows.set(0, t, 0, d, number(t, d));
    }
    fit_and_encode(codec, rows, cache);
  }
  float* table(sikv_table_role role) const { return cache.table(kind, role, 0); }
  // Squared, over all tokens; of values on request in units of each token's range, which is what
  // levels are fitted in.
  double error(bool in_ranges = false) const {
    double sum = 0;
    for (int32_t t = 0; t < rows.count(0); ++t) {
      const std::vector<float> row = rows.row(0, t, 0);
      const std::vector<float> decoded = decode_slots(codec, cache, 0, {&t, 1});
      const double unit =
          in_ranges && kind == SIKV_VALUE_CODEC
              ? kvquant::half_of(kvquant::narrowest({rows.head_dim(), 0}, row.data()))
              : 1.0;
      for (size_t d = 0; d < row.size(); ++d) sum += std::pow((decoded[d] - row[d]) / unit, 2);
    }
    return sum;
  }

  sikv_kind kind;
  CodecInstance codec;
  TestRows rows;
  TestCache cache;
};

TEST(KvquantTest, AChannelsRangeIsBetweenItsPercentiles) {
  // Channel d holds d + 0 .. d + 1000 in some order: 0.5% of them lie below d + 5, as many above.
  const Encoded keys(SIKV_KEY_CODEC, 3, 1001, 64,
                     [](int t, int d) { return static_cast<float>(d + t * 10 % 1001); });
  for (const int d : {0, 31, 63}) {
    EXPECT_EQ(keys.table(SIKV_KEY_MEAN)[d], static_cast<float>(d + 500));
    EXPECT_EQ(keys.table(SIKV_KEY_SCALE)[d], 495.0f);
  }
}

TEST(KvquantTest, PercentilesLieBetweenNeighbours) {
  // Of 0, 100, 200: a hundredth of the way from the ends.
  const Encoded keys(SIKV_KEY_CODEC, 3, 3, 64,
                     [](int t, int) { return static_cast<float>(100 * t); });
  EXPECT_EQ(keys.table(SIKV_KEY_MEAN)[0], 100.0f);
  EXPECT_FLOAT_EQ(keys.table(SIKV_KEY_SCALE)[0], 99.0f);
}

TEST(KvquantTest, CodebooksAscendInsideTheRange) {
  for (const sikv_kind kind : {SIKV_KEY_CODEC, SIKV_VALUE_CODEC}) {
    for (const int bits : {2, 3, 4, 5}) {
      Random random(7);
      const Encoded encoded(kind, bits, 600, 64, [&](int, int) { return laplace(random); });
      const float* levels = encoded.table(SIKV_CODEBOOK);
      for (int i = 0; i + 1 < 1 << bits; ++i) EXPECT_LT(levels[i], levels[i + 1]);
      EXPECT_GT(levels[0], -1.0f);
      EXPECT_LT(levels[(1 << bits) - 1], 1.0f);
    }
  }
}

TEST(KvquantTest, ConstantRowsAreExact) {
  for (const sikv_kind kind : {SIKV_KEY_CODEC, SIKV_VALUE_CODEC}) {
    const Encoded encoded(kind, 2, 40, 64, [](int, int) { return -3.25f; });
    EXPECT_EQ(encoded.error(), 0.0);
  }
  // Of keys also channels that are constant, each its own.
  const Encoded channels(SIKV_KEY_CODEC, 2, 40, 64,
                         [](int, int d) { return static_cast<float>(d) / 3.0f; });
  EXPECT_LT(channels.error(), 1e-5);  // entries are fp16
}

TEST(KvquantTest, ErrorFallsWithEveryBit) {
  for (const sikv_kind kind : {SIKV_KEY_CODEC, SIKV_VALUE_CODEC}) {
    double last = HUGE_VAL;
    for (const int bits : {2, 3, 4, 5}) {
      Random random(11);
      const Encoded encoded(kind, bits, 600, 64, [&](int, int) { return laplace(random); });
      EXPECT_LT(encoded.error(), 0.4 * last) << bits;  // a quarter at high rate
      last = encoded.error();
    }
  }
}

// The same codec with equally spaced levels in the codebook, on numbers with heavy tails.
TEST(KvquantTest, FittedLevelsBeatUniformOnes) {
  for (const sikv_kind kind : {SIKV_KEY_CODEC, SIKV_VALUE_CODEC}) {
    for (const int bits : {2, 3, 4}) {
      Random random(13);
      Encoded encoded(kind, bits, 600, 64, [&](int, int) { return laplace(random); });
      const double fitted = encoded.error(true);
      float* levels = encoded.table(SIKV_CODEBOOK);
      const int count = 1 << bits;
      for (int i = 0; i < count; ++i) {
        levels[i] = -1.0f + 2.0f * static_cast<float>(i) / static_cast<float>(count - 1);
      }
      encode_part(encoded.codec, encoded.rows, encoded.cache, 0, {600});
      EXPECT_LT(fitted, 0.9 * encoded.error(true)) << bits;
    }
  }
}

TEST(KvquantTest, BytesPerToken) {
  const auto bytes = [](sikv_kind kind, const Choices& choices, int head_dim) {
    const sikv_layout layout =
        make_codec(kind, "kvquant", choices, make_shape(head_dim, SIKV_FP16)).describe();
    return layout.planes[0].bytes_per_tile + layout.planes[1].bytes_per_tile;
  };
  EXPECT_EQ(bytes(SIKV_KEY_CODEC, {}, 128), 54u);
  EXPECT_EQ(bytes(SIKV_VALUE_CODEC, {}, 128), 58u);
  EXPECT_EQ(bytes(SIKV_KEY_CODEC, {{"bits", "4"}}, 128), 70u);
  EXPECT_EQ(bytes(SIKV_KEY_CODEC, {}, 64), 27u);
  EXPECT_EQ(bytes(SIKV_VALUE_CODEC, {}, 64), 31u);
}

}  // namespace
}  // namespace sikv::testing
