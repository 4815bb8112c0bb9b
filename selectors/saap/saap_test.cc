#include "selectors/saap/saap.h"

#include <gtest/gtest.h>

#include <fstream>

#include "tests/support/selector_session.h"
#include "tests/support/temporary.h"

namespace sikv::testing {
namespace {

const Variant& saap_variant() { return find_variant(SIKV_SELECTOR, "saap"); }

constexpr int kDim = 64, kTokens = 200, kTail = 10;
constexpr double kTheta = 10000;  // of the tests' shapes
const CacheSpec kSpec{
    .num_kv_heads = 1, .head_dim = kDim, .dtype = SIKV_FP32, .encoded = {kTokens}, .tail = {kTail}};

// x [D] as a position turns it, layout half.
std::vector<float> turned(std::vector<float> x, int position) {
  for (size_t i = 0; i < kDim / 2; ++i) {
    const double angle = position * std::pow(kTheta, -2.0 * static_cast<double>(i) / kDim);
    const double a = x[i], b = x[i + kDim / 2];
    x[i] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
    x[i + kDim / 2] = static_cast<float>(a * std::sin(angle) + b * std::cos(angle));
  }
  return x;
}

// Direction c of four: no two share a channel.
std::vector<float> direction(int c) {
  std::vector<float> x(kDim);
  for (size_t i = 0; i < 4; ++i) x[static_cast<size_t>(c) * 4 + i] = 2.0f;
  return x;
}

// Key t points in direction t % 4, turned by its position where that is asked for.
struct FourDirections {
  explicit FourDirections(bool rope)
      : filled(kSpec, make_codec(SIKV_KEY_CODEC, "fp16", {}, tight_shape(kSpec, 1)),
               make_codec(SIKV_VALUE_CODEC, "fp16", {}, tight_shape(kSpec, 1))) {
    for (int t = 0; t < kTokens + kTail; ++t) {
      const std::vector<float> key = rope ? turned(direction(t % 4), t) : direction(t % 4);
      for (int d = 0; d < kDim; ++d) filled.k.set(0, t, 0, d, key[static_cast<size_t>(d)]);
    }
  }
  FilledCache filled;
};

std::vector<uint8_t> bytes_of(const std::vector<float>& q) {
  const auto* first = reinterpret_cast<const uint8_t*>(q.data());
  return {first, first + q.size() * sizeof(float)};
}

int in_direction(const Slots& slots, int c) {
  return static_cast<int>(
      std::count_if(slots.begin(), slots.end(), [&](int32_t slot) { return slot % 4 == c; }));
}

// 60 tokens: the 50 of the query's own bucket, and the lowest ten of one other.
TEST(SaapTest, TakesWholeBucketsAndOfTheLastTheLowerSlots) {
  const FourDirections keys(false);
  const FilledCache& filled = keys.filled;
  SelectorSession session(saap_variant(), {{"budget", "60"}, {"clusters", "4"}, {"rope", "kept"}},
                          filled, 1);
  session.observe_everything();
  std::vector<float> q = direction(2);
  for (int d = 0; d < 4; ++d) q[static_cast<size_t>(4 + d)] = 1.0f;  // then direction 1
  const Slots slots = session.select(0, bytes_of(q))[0];
  ASSERT_EQ(slots.size(), 60u);
  EXPECT_EQ(in_direction(slots, 2), 50);
  EXPECT_EQ(in_direction(slots, 1), 10);
  EXPECT_TRUE(std::all_of(slots.begin(), slots.end(),
                          [](int32_t slot) { return slot % 4 == 2 || slot < 40; }));
}

// Positions turn equal keys apart; undone, they fall in one bucket again, and the query finds it
// from its own position.
TEST(SaapTest, UndoesRope) {
  const FourDirections keys(true);
  const FilledCache& filled = keys.filled;
  for (const bool undone : {true, false}) {
    SelectorSession session(
        saap_variant(), {{"budget", "50"}, {"clusters", "4"}, {"rope", undone ? "half" : "kept"}},
        filled, 1);
    session.observe_everything();
    const Slots slots = session.select(0, bytes_of(turned(direction(3), kTokens + kTail - 1)))[0];
    if (undone) {
      EXPECT_EQ(in_direction(slots, 3), 50);
    } else {
      EXPECT_LT(in_direction(slots, 3), 40);
    }
  }
}

// A network whose centroids are the four directions and that sends a query along channel 0 to
// direction 3, which no comparison with centroids would.
class NetworkFile {
 public:
  const std::string& path() const { return path_; }
  void write(std::vector<uint32_t> header, size_t floats_missing = 0,
             const char* magic = "SIKVSAP1") {
    std::vector<float> data;
    for (int c = 0; c < 4; ++c) {
      for (const float x : direction(c)) data.push_back(x / 4.0f);
    }
    constexpr int kHidden = 2;
    std::vector<float> w1(kDim * kHidden), b1(kHidden), w2(kHidden * 4), b2(4);
    w1[0] = 1.0f;   // channel 0 -> unit 0
    w2[3] = 10.0f;  // unit 0 -> bucket 3
    for (const auto* part : {&w1, &b1, &w2, &b2})
      data.insert(data.end(), part->begin(), part->end());
    std::ofstream out(path_, std::ios::binary);
    out.write(magic, 8);
    out.write(reinterpret_cast<const char*>(header.data()),
              static_cast<std::streamsize>(header.size() * sizeof(uint32_t)));
    out.write(reinterpret_cast<const char*>(data.data()),
              static_cast<std::streamsize>((data.size() - floats_missing) * sizeof(float)));
  }

 private:
  TemporaryFolder folder_;
  std::string path_ = (folder_ / "network.bin").string();
};

TEST(SaapTest, RoutesQueriesByTheNetwork) {
  NetworkFile file;
  file.write({1, 1, 1, kDim, 4, 2, 0, 0});
  const FourDirections keys(false);
  const FilledCache& filled = keys.filled;
  for (const char* variant : {"ref", "cpu"}) {
    const auto variants = registry().variants();
    if (std::none_of(variants.begin(), variants.end(),
                     [&](const Variant& v) { return v.id == "saap" && v.variant == variant; })) {
      continue;
    }
    SelectorSession session(find_variant(SIKV_SELECTOR, "saap", variant),
                            {{"budget", "50"}, {"network", file.path()}, {"rope", "kept"}}, filled,
                            1);
    session.observe_everything();
    EXPECT_EQ(in_direction(session.select(0, bytes_of(direction(0)))[0], 3), 50) << variant;
  }
}

TEST(SaapTest, RefusesFilesThatDoNotFit) {
  NetworkFile file;
  sikv_shape shape = make_shape(kDim, SIKV_FP16, 1, 1);
  const auto refusal = [&](const std::string& path) -> std::string {
    try {
      make_selector(saap_variant(), {{"network", path}, {"rope", "kept"}}, shape, cpu());
    } catch (const std::exception& error) {
      return error.what();
    }
    return "";
  };
  const std::string remedy = "; datasets/capture/train_saap.py writes one from a trace";
  const auto expect = [&](const std::string& what) {
    EXPECT_NE(refusal(file.path()).find("the network file '" + file.path() + "' " + what + remedy),
              std::string::npos)
        << refusal(file.path());
  };
  EXPECT_NE(refusal("/nowhere").find("the network file '/nowhere' cannot be opened" + remedy),
            std::string::npos);
  file.write({1, 1, 1, kDim, 4, 2, 0, 0}, 0, "SIKVPCA1");
  expect("does not begin with SIKVSAP1");
  file.write({2, 1, 1, kDim, 4, 2, 0, 0});
  expect("has 2 layers, the cache has 1");
  file.write({1, 1, 3, kDim, 4, 2, 0, 0});
  expect("has 3 query heads, the cache has 1");
  file.write({1, 1, 1, kDim, 4, 2, 1, 0});
  expect("was trained with another option `rope`");
  file.write({1, 1, 1, kDim, 0, 2, 0, 0});
  expect("has 0 centroids, not 1 to 65536");
  file.write({1, 1, 1, kDim, 4, 2, 0, 0}, 3);
  expect("has 1620 bytes, not the 1632 that its header asks for");
  file.write({1, 1, 1, kDim, 4, 2, 0, 0});
  EXPECT_EQ(refusal(file.path()), "");

  shape.rope_theta = 0;
  EXPECT_THROW(make_selector(saap_variant(), {}, shape, cpu()), std::exception);
}

// A bucket number per token, the centroids and their lengths.
TEST(SaapTest, CountsItsBuckets) {
  const FourDirections keys(false);
  const FilledCache& filled = keys.filled;
  SelectorSession session(saap_variant(), {{"clusters", "4"}, {"rope", "kept"}}, filled, 1);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 4u * (4 * kDim + 4) + 2 * kTokens);
}

}  // namespace
}  // namespace sikv::testing
