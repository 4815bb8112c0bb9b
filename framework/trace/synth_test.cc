#include "framework/trace/synth.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "framework/base/error.h"

namespace sikv {
namespace {

std::string failure(const SynthSpec& spec) {
  try {
    Synthesizer synthesizer(spec);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// FNV-1a
uint64_t digest(const std::vector<std::byte>& bytes) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const std::byte b : bytes) hash = (hash ^ static_cast<uint64_t>(b)) * 0x100000001b3ull;
  return hash;
}

// Attention of one query head by the definition, in fp64.
struct Attention {
  std::vector<double> mass;    // [T]
  std::vector<double> output;  // [D]
};

class Exact {
 public:
  Exact(const SynthSpec& spec, const TraceLayer& layer) : spec_(spec), layer_(layer) {}

  double k(int64_t t, int h, int c) const { return at(layer_.k, t * spec_.num_kv_heads + h, c); }
  double v(int64_t t, int h, int c) const { return at(layer_.v, t * spec_.num_kv_heads + h, c); }
  double q(int64_t row, int h, int c) const {
    return at(layer_.q, row * spec_.num_query_heads + h, c);
  }

  // `without` >= 0 leaves that token out.
  Attention attend(int64_t row, int query_head, int64_t without = -1) const {
    const int h = query_head / (spec_.num_query_heads / spec_.num_kv_heads);
    const int64_t visible = layer_.first_query_position + row + 1;
    Attention result;
    result.output.assign(static_cast<size_t>(spec_.head_dim), 0);
    double largest = -INFINITY, sum = 0;
    for (int64_t t = 0; t < visible; ++t) {
      double score = 0;
      for (int c = 0; c < spec_.head_dim; ++c) score += q(row, query_head, c) * k(t, h, c);
      result.mass.push_back(t == without ? -INFINITY : score / std::sqrt(spec_.head_dim));
      largest = std::max(largest, result.mass.back());
    }
    for (double& m : result.mass) sum += m = std::exp(m - largest);
    for (int64_t t = 0; t < visible; ++t) {
      double& m = result.mass[static_cast<size_t>(t)];
      m /= sum;
      for (int c = 0; c < spec_.head_dim; ++c) {
        result.output[static_cast<size_t>(c)] += m * v(t, h, c);
      }
    }
    return result;
  }

 private:
  double at(const std::vector<std::byte>& elements, int64_t vector, int c) const {
    return sikv_load(elements.data(), layer_.dtype, vector * spec_.head_dim + c);
  }

  const SynthSpec& spec_;
  const TraceLayer& layer_;
};

SynthSpec small(SynthKind kind) {
  SynthSpec spec;
  spec.kind = kind;
  spec.context = 512;
  spec.steps = 8;
  spec.num_layers = 2;
  spec.num_query_heads = 4;
  spec.num_kv_heads = 2;
  spec.head_dim = 64;
  spec.seed = 5;
  return spec;
}

TraceLayer fill(const SynthSpec& spec, int sequence = 0, int layer = 0) {
  TraceLayer result;
  Synthesizer(spec).fill(sequence, layer, result);
  return result;
}

TEST(Synth, ShapesAndDefaults) {
  SynthSpec spec = small(SynthKind::kClustered);
  const TraceLayer layer = fill(spec, 0, 1);
  EXPECT_EQ(layer.layer, 1);
  EXPECT_EQ(layer.num_tokens, 520);
  EXPECT_EQ(layer.num_queries, 72);
  EXPECT_EQ(layer.first_query_position, 448);
  EXPECT_EQ(layer.k.size(), 520u * 2 * 64 * 2);
  EXPECT_EQ(layer.v.size(), layer.k.size());
  EXPECT_EQ(layer.q.size(), 72u * 4 * 64 * 2);
  spec.num_queries = 3;
  EXPECT_EQ(fill(spec).first_query_position, 517);
  spec.context = 1;
  spec.steps = 0;
  spec.num_queries = 0;
  EXPECT_EQ(fill(spec).num_queries, 1);
}

TEST(Synth, SameSpecSameBits) {
  for (const int64_t tile : {0, 100}) {
    SynthSpec spec = small(SynthKind::kNeedle);
    spec.batch = 2;
    spec.tile_tokens = tile;
    const TraceLayer first = fill(spec, 1, 1);
    // Neither the order of visits nor leftovers in the buffer matter.
    Synthesizer synthesizer(spec);
    TraceLayer again;
    synthesizer.fill(0, 0, again);
    EXPECT_FALSE(again.k == first.k);
    synthesizer.fill(0, 1, again);
    EXPECT_FALSE(again.k == first.k);
    synthesizer.fill(1, 1, again);
    EXPECT_TRUE(again.k == first.k);
    EXPECT_TRUE(again.v == first.v);
    EXPECT_TRUE(again.q == first.q);
    spec.seed = 6;
    EXPECT_FALSE(fill(spec, 1, 1).k == first.k);
  }
}

// The bits are promised to be the same everywhere: results of different machines are compared.
TEST(Synth, GoldenBits) {
  SynthSpec spec = small(SynthKind::kNeedle);
  TraceLayer layer = fill(spec);
  EXPECT_EQ(digest(layer.k), 0x8e8e02b8c62c1821ull);
  EXPECT_EQ(digest(layer.v), 0x5b6d2697d1852317ull);
  EXPECT_EQ(digest(layer.q), 0xbecfe3728316796dull);
  spec.kind = SynthKind::kGaussian;
  spec.dtype = SIKV_FP32;
  spec.tile_tokens = 64;
  layer = fill(spec);
  EXPECT_EQ(digest(layer.k), 0xb4a7d05dc00c4451ull);
  EXPECT_EQ(digest(layer.q), 0xe551285a8c3252f9ull);
}

TEST(Synth, GaussianMoments) {
  for (const int64_t tile : {0, 128}) {
    SynthSpec spec = small(SynthKind::kGaussian);
    spec.tile_tokens = tile;
    const TraceLayer layer = fill(spec);
    for (const auto* elements : {&layer.k, &layer.v, &layer.q}) {
      const double n = static_cast<double>(elements->size()) / 2;
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < static_cast<int64_t>(n); ++i) {
        const double x = sikv_load(elements->data(), layer.dtype, i);
        sum += x;
        squares += x * x;
      }
      // Tiles repeat magnitudes, so that only n / (520 / 128) of them are independent.
      const double independent = tile > 0 ? n / 5 : n;
      EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
      EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2 / independent));
    }
  }
}

TEST(Synth, ClusteredKeysHaveOutlierChannelsAndAnOffset) {
  for (const int head_dim : {64, 128}) {
    SynthSpec spec = small(SynthKind::kClustered);
    spec.head_dim = head_dim;
    spec.context = 2048;
    const TraceLayer layer = fill(spec);
    const Exact exact(spec, layer);
    for (int h = 0; h < spec.num_kv_heads; ++h) {
      int outliers = 0;
      double offset = 0;
      for (int c = 0; c < head_dim; ++c) {
        double sum = 0, squares = 0;
        for (int64_t t = 4; t < layer.num_tokens; ++t) {
          sum += exact.k(t, h, c);
          squares += exact.k(t, h, c) * exact.k(t, h, c);
        }
        const double n = static_cast<double>(layer.num_tokens - 4);
        const double deviation = std::sqrt(squares / n - sum / n * (sum / n));
        const double scale = deviation > 3 ? 8 : 1;
        outliers += scale == 8;
        EXPECT_NEAR(deviation, scale, 0.3 * scale);
        offset += std::abs(sum / n) / scale / head_dim;
      }
      EXPECT_EQ(outliers, head_dim / 32);
      EXPECT_NEAR(offset, std::sqrt(2 / M_PI), 0.3);  // the mean of |N|
    }
  }
}

TEST(Synth, EveryQueryAttendsToTheSinks) {
  for (const int64_t context : {512, 8192}) {
    SynthSpec spec = small(SynthKind::kClustered);
    spec.context = context;
    const TraceLayer layer = fill(spec);
    const Exact exact(spec, layer);
    double mean = 0;
    for (int64_t row = 0; row < layer.num_queries; ++row) {
      for (int h = 0; h < spec.num_query_heads; ++h) {
        const Attention attention = exact.attend(row, h);
        double sinks = 0;
        for (size_t t = 0; t < 4; ++t) sinks += attention.mass[t];
        EXPECT_GT(sinks, 0.25) << "query " << row << ", head " << h;
        EXPECT_LT(sinks, 0.9) << "query " << row << ", head " << h;
        mean += sinks / static_cast<double>(layer.num_queries * spec.num_query_heads);
      }
    }
    EXPECT_NEAR(mean, 0.62, 0.1);
    for (int64_t t = 0; t < 4; ++t) {
      for (int c = 0; c < spec.head_dim; ++c) EXPECT_LT(std::abs(exact.v(t, 0, c)), 0.1);
    }
  }
}

TEST(Synth, QueriesAreSmoothOverTime) {
  const SynthSpec spec = small(SynthKind::kClustered);
  const TraceLayer layer = fill(spec);
  const Exact exact(spec, layer);
  const auto cosine = [&](int64_t a, int64_t b) {
    double ab = 0, aa = 0, bb = 0;
    for (int c = 0; c < spec.head_dim; ++c) {
      ab += exact.q(a, 0, c) * exact.q(b, 0, c);
      aa += exact.q(a, 0, c) * exact.q(a, 0, c);
      bb += exact.q(b, 0, c) * exact.q(b, 0, c);
    }
    return ab / std::sqrt(aa * bb);
  };
  double near = 0, far = 0;
  for (int64_t row = 0; row < 32; ++row) {
    near += cosine(row, row + 1) / 32;
    far += cosine(row, row + 40) / 32;
  }
  EXPECT_GT(near, 0.9);
  EXPECT_LT(far, near - 0.2);
}

struct NeedleCase {
  int64_t context, steps;
  int query_heads, kv_heads, head_dim;
  int32_t dtype;
  int64_t tile;
};

void PrintTo(const NeedleCase& c, std::ostream* out) {
  *out << c.context << '+' << c.steps << " tokens, " << c.query_heads << '/' << c.kv_heads
       << " heads, D " << c.head_dim << ", dtype " << c.dtype << ", tile " << c.tile;
}

class NeedleTest : public ::testing::TestWithParam<NeedleCase> {};

TEST_P(NeedleTest, OnlyItsOwnStepFindsIt) {
  const NeedleCase& p = GetParam();
  SynthSpec spec;
  spec.kind = SynthKind::kNeedle;
  spec.context = p.context;
  spec.steps = p.steps;
  spec.batch = 2;
  spec.num_layers = 2;
  spec.num_query_heads = p.query_heads;
  spec.num_kv_heads = p.kv_heads;
  spec.head_dim = p.head_dim;
  spec.dtype = p.dtype;
  spec.tile_tokens = p.tile;
  spec.num_queries = p.steps + 1;
  Synthesizer synthesizer(spec);
  TraceLayer layer;
  for (int sequence = 0; sequence < spec.batch; ++sequence) {
    const std::vector<int64_t> needles = synthesizer.needle_positions(sequence);
    ASSERT_EQ(static_cast<int64_t>(needles.size()), p.steps);
    EXPECT_EQ(std::set<int64_t>(needles.begin(), needles.end()).size(), needles.size());
    EXPECT_GE(*std::min_element(needles.begin(), needles.end()), 4);
    EXPECT_LT(*std::max_element(needles.begin(), needles.end()),
              p.context - std::min<int64_t>(256, p.context / 4));
    for (int l = 0; l < spec.num_layers; ++l) {
      synthesizer.fill(sequence, l, layer);
      const Exact exact(spec, layer);
      for (int64_t row = 0; row < spec.num_queries; ++row) {
        const int64_t step = row - 1;  // the first query belongs to the prompt
        for (int h = 0; h < spec.num_query_heads; ++h) {
          SCOPED_TRACE(
              fmt::format("sequence {}, layer {}, head {}, step {}", sequence, l, h, step));
          const Attention attention = exact.attend(row, h);
          double own = 0, others = 0;
          for (int64_t s = 0; s < p.steps; ++s) {
            const double mass =
                attention.mass[static_cast<size_t>(needles[static_cast<size_t>(s)])];
            (s == step ? own : others) += mass;
          }
          if (step < 0) {
            EXPECT_LT(others, 0.2);
            continue;
          }
          EXPECT_GT(own, 0.5);
          EXPECT_LT(others, 0.1);
          const Attention blind = exact.attend(row, h, needles[static_cast<size_t>(step)]);
          double error = 0, norm = 0;
          for (size_t c = 0; c < attention.output.size(); ++c) {
            error += std::pow(attention.output[c] - blind.output[c], 2);
            norm += std::pow(attention.output[c], 2);
          }
          EXPECT_GT(std::sqrt(error / norm), 0.5);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, NeedleTest,
                         ::testing::Values(NeedleCase{64, 2, 2, 1, 64, SIKV_FP16, 0},
                                           NeedleCase{256, 100, 4, 4, 64, SIKV_FP32, 0},
                                           NeedleCase{1000, 16, 9, 3, 64, SIKV_BF16, 0},
                                           NeedleCase{2048, 8, 8, 2, 128, SIKV_FP16, 0},
                                           NeedleCase{2000, 8, 8, 1, 256, SIKV_BF16, 512},
                                           NeedleCase{20000, 3, 2, 1, 64, SIKV_FP16, 4096},
                                           NeedleCase{65536, 2, 1, 1, 96, SIKV_FP16, 4096}));

TEST(Synth, TilesAreNotCopies) {
  SynthSpec spec = small(SynthKind::kClustered);
  spec.tile_tokens = 64;
  spec.batch = 2;
  const TraceLayer layer = fill(spec), other = fill(spec, 1);
  const Exact exact(spec, layer);
  std::set<std::vector<double>> rows;
  for (int64_t t = 0; t < layer.num_tokens; ++t) {
    std::vector<double> row;
    for (int c = 0; c < spec.head_dim; ++c) row.push_back(exact.k(t, 0, c));
    rows.insert(row);
  }
  EXPECT_EQ(static_cast<int64_t>(rows.size()), layer.num_tokens);
  EXPECT_FALSE(layer.k == other.k);
}

TEST(Synth, WrittenAndReadBack) {
  std::string pattern = (std::filesystem::temp_directory_path() / "sikv-synth-XXXXXX").string();
  ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
  const std::filesystem::path path = std::filesystem::path(pattern) / "needle.h5";
  for (const int32_t dtype : {SIKV_FP32, SIKV_FP16, SIKV_BF16}) {
    SynthSpec spec = small(SynthKind::kNeedle);
    spec.dtype = dtype;
    spec.batch = 2;
    Synthesizer synthesizer(spec);
    write_trace(path, synthesizer, 1);
    const TraceReader reader(path);
    EXPECT_EQ(reader.meta().model, "synthetic-needle");
    EXPECT_EQ(reader.needles(), synthesizer.needle_positions(1));
    EXPECT_EQ(reader.tokens(), synthesizer.tokens(1));
    EXPECT_EQ(reader.layers(), (std::vector<int>{0, 1}));
    for (int l = 0; l < 2; ++l) {
      const TraceLayer expected = fill(spec, 1, l), read = reader.read_layer(l);
      EXPECT_EQ(read.dtype, dtype);
      EXPECT_TRUE(read.k == expected.k);
      EXPECT_TRUE(read.v == expected.v);
      EXPECT_TRUE(read.q == expected.q);
    }
    EXPECT_EQ(check(reader), std::vector<std::string>());
  }
  std::filesystem::remove_all(pattern);
}

TEST(Synth, KindsByName) {
  for (const SynthKind kind : {SynthKind::kGaussian, SynthKind::kClustered, SynthKind::kNeedle}) {
    EXPECT_EQ(parse_synth_kind(synth_kind_name(kind)), kind);
  }
  try {
    parse_synth_kind("neddle");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "synthetic: kind 'neddle' is not one of gaussian, clustered, needle; did you mean "
                 "'needle'?");
  }
}

TEST(Synth, ImpossibleSpecs) {
  SynthSpec spec = small(SynthKind::kNeedle);
  spec.steps = 400;
  EXPECT_EQ(
      failure(spec),
      "synthetic: 400 steps need a needle each, and a context of 512 has room for 380; use fewer "
      "steps or a longer context");
  spec = small(SynthKind::kNeedle);
  spec.context = 63;
  EXPECT_EQ(failure(spec), "synthetic: context is 63; it must be from 64 to 4294967296");
  spec = small(SynthKind::kNeedle);
  spec.num_queries = 7;
  EXPECT_EQ(failure(spec), "synthetic: num_queries is 7; 8 steps need at least one each");
  spec = small(SynthKind::kGaussian);
  spec.num_queries = 521;
  EXPECT_EQ(failure(spec), "synthetic: num_queries is 521; it must be from 0 to 520");
  spec = small(SynthKind::kGaussian);
  spec.head_dim = 72;
  EXPECT_EQ(failure(spec),
            "synthetic: head_dim 72 is not supported; use a model with one of 64, 96, 128, 256");
  spec = small(SynthKind::kGaussian);
  spec.num_kv_heads = 3;
  EXPECT_NE(failure(spec).find("4 query heads cannot share 3 KV heads evenly"), std::string::npos);
  spec = small(SynthKind::kGaussian);
  spec.dtype = SIKV_FP8_E5M2;
  EXPECT_EQ(failure(spec), "synthetic: element type 4 cannot be made; use fp16, bf16 or fp32");
  spec = small(SynthKind::kGaussian);
  EXPECT_THROW(fill(spec, 1), Error);
  EXPECT_THROW(fill(spec, 0, 2), Error);
}

}  // namespace
}  // namespace sikv
