// What the selector and kernel suites run over: caches of awkward shapes and every stored layout.
#ifndef SIKV_TESTS_CONFORMANCE_CASES_H_
#define SIKV_TESTS_CONFORMANCE_CASES_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "plugins/layouts/dtype_name.h"
#include "tests/support/guarded.h"
#include "tests/support/plugins.h"
#include "tests/support/queries.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {

// ---- shapes -------------------------------------------------------------------------------------

struct Case {
  CacheSpec cache;
  int group = 1;  // G
};

inline std::string describe(const std::vector<int>& numbers) {
  std::string text;
  for (int n : numbers) text.append(" ").append(std::to_string(n));
  return text;
}

inline std::string describe(const Case& c) {
  return "encoded" + describe(c.cache.encoded) + ", tail" + describe(c.cache.tail) + ", pinned " +
         std::to_string(c.cache.pinned) + ", H " + std::to_string(c.cache.num_kv_heads) + ", G " +
         std::to_string(c.group) + ", D " + std::to_string(c.cache.head_dim) + ", " +
         std::string(dtype_name(c.cache.dtype)) + ", seed " + std::to_string(c.cache.seed);
}

inline Case make_case(std::vector<int> encoded, std::vector<int> tail, int pinned, int heads,
                      int group, int head_dim, int32_t dtype, uint64_t seed = 1) {
  return {{.num_kv_heads = heads,
           .head_dim = head_dim,
           .dtype = dtype,
           .encoded = std::move(encoded),
           .tail = std::move(tail),
           .pinned = pinned,
           .seed = seed},
          group};
}

// Every G of 1, 3, 4, 8, every D, every dtype, lengths around tiles and pages, empty parts.
inline std::vector<Case> awkward_cases() {
  return {
      make_case({1}, {0}, 0, 1, 1, 64, SIKV_FP16),
      make_case({3, 1}, {2, 1}, 1, 2, 3, 96, SIKV_BF16),
      make_case({31, 33, 0}, {0, 1, 5}, 4, 1, 4, 128, SIKV_FP32),
      make_case({255, 256, 257}, {1, 0, 255}, 16, 2, 1, 128, SIKV_FP16),
      make_case({1003}, {33}, 64, 1, 8, 256, SIKV_BF16),
      make_case({0, 0}, {7, 1}, 3, 2, 3, 64, SIKV_FP32),    // the tail alone
      make_case({33, 3}, {0, 0}, 64, 1, 4, 96, SIKV_FP16),  // everything pinned
      make_case({512, 31}, {256, 1}, 5, 2, 8, 64, SIKV_BF16),
  };
}

inline Case random_case(uint64_t seed) {
  Random random(derive_seed(7, seed));
  const auto pick = [&](std::initializer_list<int> of) {
    return of.begin()[random.below(of.size())];
  };
  const auto length = [&](uint64_t most) {
    return static_cast<int>(random.below(1 + (random.below(2) != 0 ? most : most / 16)));
  };
  std::vector<int> encoded, tail;
  for (uint64_t b = random.below(3) + 1; b > 0; --b) {
    encoded.push_back(length(800));
    tail.push_back(std::max(length(256), encoded.back() == 0 ? 1 : 0));
  }
  return make_case(std::move(encoded), std::move(tail), pick({0, 1, 16, 64}), pick({1, 2, 3}),
                   pick({1, 3, 4, 8}), pick({64, 96, 128, 256}),
                   pick({SIKV_FP32, SIKV_FP16, SIKV_BF16}), seed);
}

inline sikv_shape shape_of(const Case& c) { return tight_shape(c.cache, c.group); }

// ---- layouts ------------------------------------------------------------------------------------

struct CodecChoice {
  std::string id;
  Choices choices;
  bool is_default;
};

inline std::string describe(const CodecChoice& codec) { return describe(codec.id, codec.choices); }

// Nothing if the codec does not take the case's shape.
inline std::optional<CodecInstance> try_codec(sikv_kind kind, const CodecChoice& codec,
                                              const sikv_shape& shape) {
  try {
    return make_codec(kind, codec.id, codec.choices, shape);
  } catch (const Error&) {
    return std::nullopt;
  }
}

// One codec for each layout that the build tree's codecs can write at D = 128; the default ones
// first.
inline std::vector<CodecChoice> all_layouts(sikv_kind kind) {
  std::vector<CodecChoice> codecs;
  std::vector<sikv_layout> seen;
  const auto add = [&](const CodecChoice& choice) {
    const auto codec = try_codec(kind, choice, make_shape(128, SIKV_FP16));
    if (!codec) return;
    const sikv_layout layout = codec->describe();
    const auto same = [&](const sikv_layout& other) {
      return std::memcmp(&layout, &other, sizeof layout) == 0;
    };
    if (std::any_of(seen.begin(), seen.end(), same)) return;
    seen.push_back(layout);
    codecs.push_back(choice);
  };
  const std::vector<std::string> ids = registry().ids(kind);
  for (const std::string& id : ids) add({id, {}, true});
  for (const std::string& id : ids) {
    for (const Choices& choices : all_choices(find_variant(kind, id))) add({id, choices, false});
  }
  return codecs;
}

inline std::vector<CodecChoice> default_layouts(sikv_kind kind) {
  std::vector<CodecChoice> layouts = all_layouts(kind);
  std::erase_if(layouts, [](const CodecChoice& codec) { return !codec.is_default; });
  return layouts;
}

// ---- variants ------------------------------------------------------------------------

// A suite over every variant of a kind. CUDA variants are skipped where there is no GPU, and fail
// where there is one that they do not run on.
class VariantTest : public ::testing::TestWithParam<Subject> {
 protected:
  void SetUp() override {
    if (GetParam().found != nullptr) return;
    if (GetParam().wraps_nothing) GTEST_SKIP() << GetParam().reason;
    if (!gpu_missing().empty()) GTEST_SKIP() << gpu_missing();
    FAIL() << GetParam().id << " (" << GetParam().variant << "): " << GetParam().reason;
  }
  const Variant& variant() const { return *GetParam().found; }
  bool on_gpu() const { return variant().device == SIKV_CUDA; }
};

inline std::string test_name(const ::testing::TestParamInfo<Subject>& info) {
  return info.param.id + "_" + info.param.variant;
}

// [B, Hq, D] unit normals in the case's type.
inline std::vector<uint8_t> make_queries(const Case& c, uint64_t seed) {
  return gaussian_queries(c.cache, c.group, 1, derive_seed(c.cache.seed, seed));
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_CONFORMANCE_CASES_H_
