// What holds for every key and value codec, variant and option. `ref` is the truth: other variants
// must write its bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "plugins/layouts/nibble_tile.h"
#include "tests/conformance/cases.h"
#include "tests/support/device_call.h"

namespace sikv::testing {
namespace {

constexpr int kHeadDims[] = {64, 96, 128, 256};
constexpr int32_t kInputTypes[] = {SIKV_FP16, SIKV_BF16, SIKV_FP32};
constexpr uint8_t kPoison = 0xa5;

struct Config {
  Choices choices;
  int head_dim;
  int32_t dtype;
};

// Room for what the tests hold: workspaces grow with it, and are looked at whole.
sikv_shape shape_of(const Config& config) {
  sikv_shape shape = make_shape(config.head_dim, config.dtype);
  shape.max_tokens = 1024;
  return shape;
}

std::string text(const Variant& variant, const Config& config) {
  return std::string(kind_name(variant.kind)) + " " + describe(variant.id, config.choices) + " " +
         variant.variant + ", D " + std::to_string(config.head_dim) + ", " +
         std::string(dtype_name(config.dtype));
}

// ---- a codec at work ----------------------------------------------------------------------------

bool shares_scales(const sikv_layout& layout) {
  return std::any_of(layout.planes, layout.planes + layout.num_planes,
                     [](const sikv_plane& plane) { return plane.organisation == SIKV_SHARED; });
}

// One codec over a cache whose other side is empty.
struct Bench {
  Bench(const Variant& variant, const Config& config, std::vector<int> lengths, int threads = 1,
        uint64_t seed = 1)
      : kind(variant.kind),
        codec(make_instance<CodecInstance>(variant, config.choices, shape_of(config),
                                           device_of(variant, threads))),
        layout(codec.describe()),
        cache(spec(config, std::move(lengths), seed), kind == SIKV_KEY_CODEC ? layout : kNothing,
              kind == SIKV_KEY_CODEC ? kNothing : layout),
        rows(cache.spec().encoded, 2, config.head_dim, config.dtype) {}

  CacheSpec spec(const Config& config, std::vector<int> lengths, uint64_t seed) const {
    if (shares_scales(layout)) {  // whole pages only
      for (int& n : lengths) n = (n + kPageTokens - 1) / kPageTokens * kPageTokens;
    }
    return {.head_dim = config.head_dim,
            .dtype = config.dtype,
            .encoded = std::move(lengths),
            .seed = seed};
  }

  void fit_and_encode() { testing::fit_and_encode(codec, rows, cache); }
  std::vector<uint8_t> row_bytes(int row) const { return cache.row_bytes(kind, row); }
  std::vector<float> decode(int row, std::span<const int32_t> slots) const {
    return decode_slots(codec, cache, row, slots);
  }
  std::vector<float> decode_all(int row) const {
    std::vector<int32_t> slots(static_cast<size_t>(rows.count(row / rows.num_heads())));
    std::iota(slots.begin(), slots.end(), 0);
    return decode(row, slots);
  }

  struct Squares {
    double error = 0, rows = 0;
  };
  // Sums over the whole batch of (decoded - rows)^2 and rows^2.
  Squares squares() const {
    Squares sum;
    for (int row = 0; row < cache.num_rows(); ++row) {
      const std::vector<float> decoded = decode_all(row);
      const int b = row / rows.num_heads(), h = row % rows.num_heads();
      for (size_t i = 0; i < decoded.size(); ++i) {
        const int t = static_cast<int>(i) / rows.head_dim(),
                  d = static_cast<int>(i) % rows.head_dim();
        const double x = rows.at(b, t, h, d);
        sum.error += (decoded[i] - x) * (decoded[i] - x);
        sum.rows += x * x;
      }
    }
    return sum;
  }
  // ||decoded - rows|| / ||rows||; 0 for 0 / 0.
  double relative_error() const {
    const Squares sum = squares();
    return sum.error == 0 ? 0 : std::sqrt(sum.error / sum.rows);
  }

  static constexpr int kPageTokens = SIKV_PAGE_TOKENS;
  static constexpr sikv_layout kNothing{};

  sikv_kind kind;
  CodecInstance codec;
  sikv_layout layout;
  TestCache cache;
  TestRows rows;
};

// Whether a mean or a range is fitted, so that 8 added to unit normal rows costs little: the error
// grows 1.8 times at most. Such a codec stores what is constant exactly; to others a constant row is
// one direction among others, and their error grows with the norm, 6 to 8 times.
bool fits_offsets(const Variant& variant, const Config& config) {
  const auto squared_error = [&](float offset) {
    Bench bench(variant, config, {64});
    Random random(11);
    for (int t = 0; t < bench.rows.count(0); ++t) {
      for (int h = 0; h < bench.rows.num_heads(); ++h) {
        for (int d = 0; d < config.head_dim; ++d) {
          bench.rows.set(0, t, h, d, offset + static_cast<float>(random.normal()));
        }
      }
    }
    bench.fit_and_encode();
    return bench.squares().error;
  };
  return squared_error(8) <= 10 * squared_error(0);
}

// Whether a page still holds poison in everything that belongs to tokens [from, 256).
::testing::AssertionResult poisoned_from(const Bench& bench, int row, int page_index, int from) {
  for (uint32_t i = 0; i < bench.layout.num_planes; ++i) {
    const sikv_plane& plane = bench.layout.planes[i];
    const uint8_t* page =
        bench.cache.page(bench.kind, static_cast<sikv_role>(plane.role), row, page_index);
    const auto fault = [&](int token) {
      return ::testing::AssertionFailure()
             << "plane " << i << " row " << row << " page " << page_index << ": token " << token
             << " was written, but only " << from << " belong to the call";
    };
    if (plane.organisation == SIKV_NIBBLE_TILES) {
      for (int token = from; token < SIKV_PAGE_TOKENS; ++token) {
        for (int group = 0; group < bench.rows.head_dim() / 4; ++group) {
          const uint32_t nibble = nibble_tile::get(page, bench.rows.head_dim(), token, group);
          if (nibble != (token % 2 == 0 ? kPoison & 15u : kPoison >> 4)) return fault(token);
        }
      }
    } else {
      const int tile = static_cast<int>(plane.tile_tokens);
      for (int t = (from + tile - 1) / tile; t < SIKV_PAGE_TOKENS / tile; ++t) {
        const uint8_t* bytes = page + int64_t{t} * sikv_tile_stride(&bench.layout, i);
        if (std::any_of(bytes, bytes + plane.bytes_per_tile,
                        [](uint8_t b) { return b != kPoison; })) {
          return fault(t * tile);
        }
      }
    }
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult inside_its_tokens(const Bench& bench) {
  const std::string damage = bench.cache.damage();
  if (!damage.empty()) return ::testing::AssertionFailure() << damage;
  for (int row = 0; row < bench.cache.num_rows(); ++row) {
    const int tokens = bench.rows.count(row / bench.rows.num_heads());
    if (tokens % SIKV_PAGE_TOKENS == 0) continue;
    const auto result =
        poisoned_from(bench, row, tokens / SIKV_PAGE_TOKENS, tokens % SIKV_PAGE_TOKENS);
    if (!result) return result;
  }
  return ::testing::AssertionSuccess();
}

// ---- the suite ----------------------------------------------------------------------------------

class CodecConformanceTest : public VariantTest {
 protected:
  const Variant& ref() const { return find_variant(variant().kind, variant().id); }

  // The defaults with every head dimension and input type; every other option value alone and every
  // head dimension, input types taking turns. Combinations that the codec refuses (a scale group
  // that does not divide D, bits without such a layout) are left out.
  template <typename Body>
  void for_each_config(Body&& body) const {
    for (const int head_dim : kHeadDims) {
      for (const int32_t dtype : kInputTypes) visit({{}, head_dim, dtype}, body);
    }
    std::vector<Choices> others = single_choices(variant());
    others.erase(others.begin());
    for_each_head_dim(others, body);
  }
  // Every combination of option values and head dimension, input types taking turns.
  template <typename Body>
  void for_each_combination(Body&& body) const {
    for_each_head_dim(all_choices(variant()), body);
  }

 private:
  template <typename Body>
  void for_each_head_dim(const std::vector<Choices>& list, Body&& body) const {
    int turn = 0;
    for (const Choices& choices : list) {
      for (const int head_dim : kHeadDims) {
        visit({choices, head_dim, kInputTypes[turn++ % 3]}, body);
      }
    }
  }

  template <typename Body>
  void visit(const Config& config, Body&& body) const {
    SCOPED_TRACE(text(variant(), config));
    try {
      make_instance<CodecInstance>(variant(), config.choices, shape_of(config));
    } catch (const Error& error) {
      const std::string_view what = error.what();
      ASSERT_TRUE(what.find("does not divide") != what.npos ||
                  what.find("have no layout") != what.npos)
          << what;
      return;
    }
    body(config);
  }
};

TEST_P(CodecConformanceTest, DescribesASoundLayout) {
  for_each_combination([&](const Config& config) {
    const Bench bench(variant(), config, {1});
    const sikv_layout& layout = bench.layout;
    EXPECT_EQ(layout.struct_size, sizeof(sikv_layout));
    EXPECT_EQ(layout.head_dim, static_cast<uint32_t>(config.head_dim));
    EXPECT_GE(layout.version, 1u);
    EXPECT_GT(std::string_view(layout.family).size(), 0u);
    const std::set<uint32_t> allowed =
        bench.kind == SIKV_KEY_CODEC
            ? std::set<uint32_t>{SIKV_INDEX_CODE, SIKV_MAGNITUDE, SIKV_SCALE}
            : std::set<uint32_t>{SIKV_VALUE_CODE, SIKV_VALUE_SCALE};
    std::set<uint32_t> roles;
    for (uint32_t i = 0; i < layout.num_planes; ++i) {
      const sikv_plane& plane = layout.planes[i];
      EXPECT_TRUE(roles.insert(plane.role).second) << "two planes of role " << plane.role;
      EXPECT_EQ(allowed.count(plane.role), 1u) << plane.role;
      EXPECT_GT(plane.bytes_per_tile, 0u);
      EXPECT_EQ(SIKV_PAGE_TOKENS % plane.tile_tokens, 0u);
      if (plane.organisation == SIKV_PER_TOKEN || plane.organisation == SIKV_IN_LINE) {
        EXPECT_EQ(plane.tile_tokens, 1u);
      }
      if (plane.organisation == SIKV_IN_LINE) {
        EXPECT_LE(layout.line_offset[i] + plane.bytes_per_tile, layout.line_bytes);
      }
      if (plane.organisation == SIKV_NIBBLE_TILES) {
        EXPECT_EQ(plane.tile_tokens, 8u);
        EXPECT_EQ(plane.bytes_per_tile, layout.head_dim);
      }
    }
  });
}

TEST_P(CodecConformanceTest, EveryCombinationStaysInsideItsTokensAndDecodes) {
  for_each_combination([&](const Config& config) {
    Bench bench(variant(), config, {33, 0, 3, 257});
    bench.rows.fill(Pattern::kGaussian, 3);
    bench.fit_and_encode();
    EXPECT_TRUE(inside_its_tokens(bench));
    const double error = bench.relative_error();
    EXPECT_LE(error, 0.75);  // also false for NaN
    if (&variant() != &ref()) {
      Bench truth(ref(), config, {33, 0, 3, 257});
      truth.rows.fill(Pattern::kGaussian, 3);
      truth.fit_and_encode();
      for (int row = 0; row < bench.cache.num_rows(); ++row) {
        EXPECT_EQ(bench.row_bytes(row), truth.row_bytes(row)) << "row " << row;
      }
    }
  });
}

TEST_P(CodecConformanceTest, AwkwardLengthsStayInsideTheirTokens) {
  for_each_config([&](const Config& config) {
    Bench bench(variant(), config, {1, 3, 31, 33, 255, 256, 257});
    bench.rows.fill(Pattern::kGaussian, 1);
    bench.fit_and_encode();
    EXPECT_TRUE(inside_its_tokens(bench));
    EXPECT_LE(bench.relative_error(), 0.75);
  });
}

TEST_P(CodecConformanceTest, EqualsRefOnEveryPattern) {
  for_each_config([&](const Config& config) {
    for (const Pattern pattern : kAllPatterns) {
      SCOPED_TRACE(pattern_name(pattern));
      Bench bench(variant(), config, {37, 4}, 3, 5);
      Bench truth(ref(), config, {37, 4}, 1, 6);
      bench.rows.fill(pattern, 2);
      truth.rows.fill(pattern, 2);
      bench.fit_and_encode();
      truth.fit_and_encode();
      for (int row = 0; row < bench.cache.num_rows(); ++row) {
        EXPECT_EQ(bench.row_bytes(row), truth.row_bytes(row)) << "row " << row;
        const std::vector<float> decoded = bench.decode_all(row), expected = truth.decode_all(row);
        for (size_t i = 0; i < decoded.size(); ++i) {
          ASSERT_TRUE(std::isfinite(decoded[i])) << "row " << row << " element " << i;
          ASSERT_NEAR(decoded[i], expected[i], 4e-6 * (1 + std::fabs(expected[i])));
        }
      }
      EXPECT_TRUE(inside_its_tokens(bench));
      // Where rows go beyond 65504 scales saturate and all of the norm is lost; 2-bit groups of 128
      // lose a little more around outliers.
      EXPECT_LE(bench.relative_error(), 1.25);
      if (pattern == Pattern::kZeros ||
          (pattern == Pattern::kConstant && fits_offsets(variant(), config))) {
        EXPECT_EQ(bench.relative_error(), 0.0);
      }
    }
  });
}

TEST_P(CodecConformanceTest, PagesAppendedLaterEqualOneGo) {
  for_each_config([&](const Config& config) {
    const std::vector<int> lengths = {256, 512};
    Bench once(variant(), config, lengths), paged(variant(), config, lengths, 1, 2);
    once.rows.fill(Pattern::kOffset, 4);
    paged.rows.fill(Pattern::kOffset, 4);
    once.fit_and_encode();
    fit_and_encode(paged.codec, paged.rows, paged.cache);
    // Once more over the same pages, a page at a time; sequences without that page sit out.
    for (int first = 0; first < 512; first += SIKV_PAGE_TOKENS) {
      std::vector<int> counts;
      for (const int length : lengths) counts.push_back(first < length ? SIKV_PAGE_TOKENS : 0);
      encode_part(paged.codec, paged.rows, paged.cache, first, counts);
    }
    for (int row = 0; row < 4; ++row) EXPECT_EQ(once.row_bytes(row), paged.row_bytes(row)) << row;
  });
}

TEST_P(CodecConformanceTest, LeavesOtherRowsAlone) {
  for_each_config([&](const Config& config) {
    Bench bench(variant(), config, {40, 300, 17});
    bench.rows.fill(Pattern::kGaussian, 6);
    const std::vector<int> middle = {0, bench.rows.count(1), 0};
    std::vector<std::vector<uint8_t>> before;
    for (int row = 0; row < 6; ++row) before.push_back(bench.row_bytes(row));
    fit_part(bench.codec, bench.rows.part({0, 0, 0}, middle), bench.cache);
    encode_part(bench.codec, bench.rows, bench.cache, 0, middle);
    for (const int row : {0, 1, 4, 5}) EXPECT_EQ(bench.row_bytes(row), before[row]) << row;
    for (const int row : {2, 3}) EXPECT_NE(bench.row_bytes(row), before[row]) << row;
    EXPECT_EQ(bench.cache.damage(), "");
  });
}

TEST_P(CodecConformanceTest, DecodesSlotsInAnyOrder) {
  for_each_config([&](const Config& config) {
    Bench bench(variant(), config, {300, 40});
    bench.rows.fill(Pattern::kGaussian, 7);
    bench.fit_and_encode();
    constexpr int kCapacity = 23;
    constexpr float kMark = 12345.0f;
    const int dim = config.head_dim;
    Random random(8);
    std::vector<int32_t> slots(4 * kCapacity, -1), counts;
    for (int row = 0; row < 4; ++row) {
      counts.push_back(static_cast<int32_t>(random.below(kCapacity + 1)));
      for (int i = 0; i < counts[row]; ++i) {
        slots[row * kCapacity + i] =
            static_cast<int32_t>(random.below(static_cast<uint64_t>(bench.rows.count(row / 2))));
      }
    }
    Guarded<float> out(slots.size() * static_cast<size_t>(dim));
    std::fill_n(out.data(), out.size(), kMark);
    // Rows 1 to 3: first_row offsets the cache's rows and not the arguments'.
    DeviceCall call(device_of(variant()));
    bench.codec.decode({&call.view(bench.cache), 1, 3, kCapacity, 0, call.in(slots) + kCapacity,
                        call.in(counts) + 1, call.out(out) + kCapacity * dim},
                       call.stream());
    call.finish();
    EXPECT_TRUE(out.intact());
    for (int row = 0; row < 4; ++row) {
      const std::vector<float> all = bench.decode_all(row);
      for (int i = 0; i < kCapacity; ++i) {
        const float* got = out.data() + (row * kCapacity + i) * dim;
        const bool decoded = row > 0 && i < counts[row];
        for (int d = 0; d < dim; ++d) {
          const int slot = slots[row * kCapacity + i];
          ASSERT_EQ(got[d], decoded ? all[static_cast<size_t>(slot * dim + d)] : kMark)
              << "row " << row << " entry " << i << " slot " << slot << " channel " << d;
        }
      }
    }
    EXPECT_EQ(bench.cache.damage(), "");
  });
}

TEST_P(CodecConformanceTest, RefusesWhatIsNotFinite) {
  const Config config{{}, 64, SIKV_BF16};
  const char* what = variant().kind == SIKV_KEY_CODEC ? "K is " : "V is ";
  for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    Bench bench(variant(), config, {256, 256});
    const auto refusal = [&](auto&& call) -> std::string {
      try {
        call();
      } catch (const Error& error) {
        return error.what();
      }
      return "";
    };
    bench.rows.fill(Pattern::kGaussian, 1);
    bench.fit_and_encode();
    bench.rows.set(1, 99, 1, 7, bad);
    const std::string place = "layer 0, head 1, position 99, sequence 1";
    const std::string in_fit = refusal([&] { bench.fit_and_encode(); });
    EXPECT_NE(in_fit.find(what), std::string::npos) << in_fit;
    EXPECT_NE(in_fit.find(place), std::string::npos) << in_fit;
    const std::string in_encode = refusal([&] {
      encode_part(bench.codec, bench.rows, bench.cache, 0, {256, 256});
    });
    EXPECT_NE(in_encode.find(place), std::string::npos) << in_encode;
  }
}

TEST_P(CodecConformanceTest, RefusesTokensWithoutAPage) {
  if (variant().device == SIKV_CUDA) {
    GTEST_SKIP() << "page tables lie on the GPU; the framework's cache fills them";
  }
  const Config config{{}, 64, SIKV_FP16};
  Bench bench(variant(), config, {256, 512});
  bench.rows.fill(Pattern::kGaussian, 1);
  bench.fit_and_encode();
  const std::vector<uint8_t> before = bench.row_bytes(0);
  const std::vector<int32_t> first_slot = {256, 256, 0, 0};
  const RowsPart page = bench.rows.part({0, 0}, {256, 0});
  Workspace workspace(bench.codec.workspace_bytes());
  DeviceCall call(device_of(variant()));
  try {
    bench.codec.encode(call.rows(page), call.in(first_slot), call.view(bench.cache),
                       call.out(workspace), call.stream());
    FAIL() << "expected a refusal";
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find(" of layer 0, sequence 0, KV head 0 goes to slots 256 to 511, but its page "
                        "table has no page 1: give the row its pages before its tokens"),
              std::string::npos)
        << text;
  }
  EXPECT_EQ(bench.row_bytes(0), before);
  EXPECT_EQ(bench.cache.damage(), "");
}

std::vector<Subject> all_codecs() {
  std::vector<Subject> codecs = subjects(SIKV_KEY_CODEC);
  for (const Subject& value : subjects(SIKV_VALUE_CODEC)) codecs.push_back(value);
  return codecs;
}

INSTANTIATE_TEST_SUITE_P(Codecs, CodecConformanceTest, ::testing::ValuesIn(all_codecs()),
                         [](const auto& info) {
                           const bool keys = info.param.kind == SIKV_KEY_CODEC;
                           return (keys ? "key_" : "value_") + test_name(info);
                         });

// ---- quality, from both sides -------------------------------------------------------------------

// Relative Frobenius error on unit normal rows, D = 128, fp16 input, 2 sequences of 512 tokens with
// 2 heads, as measured; a codec may move by 2% of it in either direction.
struct Quality {
  sikv_kind kind;
  const char* id;
  Choices choices;
  double error;
};

class CodecQualityTest : public ::testing::TestWithParam<std::tuple<Quality, sikv_device_type>> {};

TEST_P(CodecQualityTest, ErrorIsWhatItWas) {
  const auto& [quality, device] = GetParam();
  if (device == SIKV_CUDA && !gpu_missing().empty()) GTEST_SKIP() << gpu_missing();
  for (const Variant& variant : registry().variants()) {
    if (variant.kind != quality.kind || variant.id != quality.id || variant.device != device) {
      continue;
    }
    Bench bench(variant, {quality.choices, 128, SIKV_FP16}, {512, 512});
    bench.rows.fill(Pattern::kGaussian, 9);
    bench.fit_and_encode();
    EXPECT_NEAR(bench.relative_error(), quality.error, 0.02 * quality.error)
        << describe(variant.id, quality.choices) << " " << variant.variant;
  }
}

const Quality kQualities[] = {
    {SIKV_KEY_CODEC, "fp16", {}, 0},
    {SIKV_KEY_CODEC, "sign_vq", {}, 0.2253},
    {SIKV_KEY_CODEC, "sign_vq", {{"magnitude_bits", "0"}}, 0.5935},
    {SIKV_KEY_CODEC, "sign_vq", {{"magnitude_bits", "3"}}, 0.09665},
    {SIKV_KEY_CODEC, "sign_vq", {{"magnitude_bits", "4"}}, 0.04507},
    {SIKV_KEY_CODEC, "sign_vq", {{"magnitude_bits", "8"}}, 0.002649},
    {SIKV_KEY_CODEC, "sign_vq", {{"magnitude_bits", "16"}}, 0},
    {SIKV_KEY_CODEC, "sign_vq", {{"scale_group", "16"}}, 0.1907},
    {SIKV_KEY_CODEC, "sign_vq", {{"scale_group", "128"}}, 0.2768},
    {SIKV_KEY_CODEC, "sign_vq", {{"scale_type", "fp8_e4m3"}}, 0.2258},
    {SIKV_KEY_CODEC, "sign_vq", {{"scale_type", "fp8_e5m2"}}, 0.2245},
    {SIKV_KEY_CODEC, "sign_vq", {{"center", "median"}}, 0.2257},
    {SIKV_KEY_CODEC, "sign_vq", {{"center", "none"}}, 0.2253},
    {SIKV_KEY_CODEC, "rot_lm", {}, 0.1829},
    {SIKV_KEY_CODEC, "rot_lm", {{"bits", "2"}}, 0.339},
    {SIKV_KEY_CODEC, "rot_lm", {{"bits", "4"}}, 0.09554},
    {SIKV_KEY_CODEC, "kivi", {}, 0.3937},
    {SIKV_KEY_CODEC, "kivi", {{"bits", "4"}}, 0.07822},
    {SIKV_KEY_CODEC, "kivi", {{"group", "128"}}, 0.4995},
    {SIKV_KEY_CODEC, "kvquant", {}, 0.1615},
    {SIKV_KEY_CODEC, "kvquant", {{"bits", "2"}}, 0.3076},
    {SIKV_KEY_CODEC, "kvquant", {{"bits", "4"}}, 0.08323},
    {SIKV_KEY_CODEC, "kvquant", {{"bits", "5"}}, 0.04585},
    {SIKV_KEY_CODEC, "polarquant", {}, 0.1791},
    {SIKV_KEY_CODEC, "qjl", {}, 0.5342},
    {SIKV_KEY_CODEC, "qjl", {{"rows", "4"}}, 0.3778},
    {SIKV_KEY_CODEC, "turboquant", {}, 0.1857},
    {SIKV_KEY_CODEC, "turboquant", {{"bits", "1"}}, 0.6028},
    {SIKV_KEY_CODEC, "turboquant", {{"bits", "4"}}, 0.0975},
    {SIKV_KEY_CODEC, "turboquant", {{"form", "prod"}}, 0.2588},
    {SIKV_VALUE_CODEC, "fp16", {}, 0},
    {SIKV_VALUE_CODEC, "intq", {}, 0.3933},
    {SIKV_VALUE_CODEC, "intq", {{"bits", "4"}}, 0.07831},
    {SIKV_VALUE_CODEC, "intq", {{"bits", "8"}}, 0.004603},
    {SIKV_VALUE_CODEC, "intq", {{"bits", "16"}}, 0},
    {SIKV_VALUE_CODEC, "intq", {{"scale_group", "128"}}, 0.5005},
    {SIKV_VALUE_CODEC, "intq", {{"scale_type", "fp8_e4m3"}}, 0.3942},
    {SIKV_VALUE_CODEC, "intq", {{"scale_type", "fp8_e5m2"}}, 0.396},
    {SIKV_VALUE_CODEC, "rot_lm", {}, 0.339},
    {SIKV_VALUE_CODEC, "rot_lm", {{"bits", "3"}}, 0.1829},
    {SIKV_VALUE_CODEC, "rot_lm", {{"bits", "4"}}, 0.09554},
    {SIKV_VALUE_CODEC, "kivi", {}, 0.3933},
    {SIKV_VALUE_CODEC, "kivi", {{"bits", "4"}}, 0.07831},
    {SIKV_VALUE_CODEC, "kvquant", {}, 0.154},
    {SIKV_VALUE_CODEC, "kvquant", {{"bits", "2"}}, 0.303},
    {SIKV_VALUE_CODEC, "kvquant", {{"bits", "4"}}, 0.07657},
    {SIKV_VALUE_CODEC, "kvquant", {{"bits", "5"}}, 0.03972},
    {SIKV_VALUE_CODEC, "polarquant", {}, 0.1791},
    {SIKV_VALUE_CODEC, "turboquant", {}, 0.3428},
};

std::vector<sikv_device_type> devices() {
#ifdef SIKV_HAS_CUDA
  return {SIKV_CPU, SIKV_CUDA};
#else
  return {SIKV_CPU};
#endif
}

INSTANTIATE_TEST_SUITE_P(Codecs, CodecQualityTest,
                         ::testing::Combine(::testing::ValuesIn(kQualities),
                                            ::testing::ValuesIn(devices())),
                         [](const auto& info) {
                           const Quality& quality = std::get<0>(info.param);
                           std::string name = quality.kind == SIKV_KEY_CODEC ? "key_" : "value_";
                           name += quality.id;
                           for (const auto& [option, value] : quality.choices) {
                             name.append("_").append(option).append("_").append(value);
                           }
                           return std::get<1>(info.param) == SIKV_CPU ? name : name + "_cuda";
                         });

}  // namespace
}  // namespace sikv::testing
