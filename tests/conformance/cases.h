// What the selector and kernel suites run over: caches of awkward shapes and every stored layout.
#ifndef SIKV_TESTS_CONFORMANCE_CASES_H_
#define SIKV_TESTS_CONFORMANCE_CASES_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "framework/base/random.h"
#include "plugins/layouts/dtype_name.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {

// ---- shapes -------------------------------------------------------------------------------------

struct Case {
  CacheSpec cache;
  int group = 1;  // G
};

inline std::string describe(const Case& c) {
  const auto list = [](const std::vector<int>& numbers) {
    std::string text;
    for (int n : numbers) text += (text.empty() ? "" : ",") + std::to_string(n);
    return text;
  };
  return "encoded=" + list(c.cache.encoded) + " tail=" + list(c.cache.tail) +
         " pinned=" + std::to_string(c.cache.pinned) +
         " H=" + std::to_string(c.cache.num_kv_heads) + " G=" + std::to_string(c.group) +
         " D=" + std::to_string(c.cache.head_dim) + " " + std::string(dtype_name(c.cache.dtype)) +
         " seed=" + std::to_string(c.cache.seed);
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

// As tight as the case allows, so that what plans by it has no slack.
inline sikv_shape shape_of(const Case& c) {
  sikv_shape shape = make_shape(c.cache.head_dim, c.cache.dtype, c.cache.num_kv_heads, c.group);
  shape.max_sequences = static_cast<int32_t>(c.cache.encoded.size());
  shape.max_tokens = 1;
  for (size_t b = 0; b < c.cache.encoded.size(); ++b) {
    shape.max_tokens = std::max(shape.max_tokens, c.cache.encoded[b] + c.cache.tail[b]);
  }
  return shape;
}

// ---- layouts ------------------------------------------------------------------------------------

struct CodecChoice {
  std::string id;
  Choices choices;
  bool is_default;
};

inline std::string describe(const CodecChoice& codec) { return describe(codec.id, codec.choices); }

inline CodecInstance make_codec(sikv_kind kind, const CodecChoice& codec, const Case& c) {
  return make_codec(kind, codec.id, codec.choices, shape_of(c));
}

// One codec for each layout that the build tree's codecs can write; the default ones first.
inline std::vector<CodecChoice> all_layouts(sikv_kind kind) {
  std::vector<CodecChoice> codecs;
  std::vector<sikv_layout> seen;
  const auto add = [&](const std::string& id, const Choices& choices) {
    const CodecInstance codec = make_codec(kind, id, choices, make_shape(64, SIKV_FP16));
    const sikv_layout layout = codec.describe();
    const auto same = [&](const sikv_layout& other) {
      return std::memcmp(&layout, &other, sizeof layout) == 0;
    };
    if (std::any_of(seen.begin(), seen.end(), same)) return;
    seen.push_back(layout);
    codecs.push_back({id, choices, choices.empty()});
  };
  const std::vector<std::string> ids = registry().ids(kind);
  for (const std::string& id : ids) add(id, {});
  for (const std::string& id : ids) {
    for (const Choices& choices : all_choices(find_variant(kind, id))) add(id, choices);
  }
  return codecs;
}

// ---- variants and memory ------------------------------------------------------------------------

// Every variant of a kind that runs on this machine's CPU.
inline std::vector<const Variant*> cpu_variants(sikv_kind kind) {
  std::vector<const Variant*> variants;
  for (const std::string& id : registry().ids(kind)) {
    for (const Candidate& candidate : registry().candidates(kind, id, cpu().info())) {
      if (candidate.score > 0) variants.push_back(candidate.variant);
    }
  }
  return variants;
}

inline std::string test_name(const ::testing::TestParamInfo<const Variant*>& info) {
  return info.param->id + "_" + info.param->variant;
}

// n elements between two guards, every byte 0xff until written: NaN, or -1.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t n) : n_(n), storage_(n + 2 * kGuard) {
    std::memset(storage_.data(), 0x5a, storage_.size() * sizeof(T));
    poison();
  }
  T* data() { return storage_.data() + kGuard; }
  const T* data() const { return storage_.data() + kGuard; }
  T operator[](size_t i) const { return data()[i]; }
  size_t size() const { return n_; }
  void poison() { std::memset(static_cast<void*>(data()), 0xff, n_ * sizeof(T)); }
  bool intact() const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(storage_.data());
    const size_t guard = kGuard * sizeof(T), all = storage_.size() * sizeof(T);
    const auto is_guard = [](uint8_t byte) { return byte == 0x5a; };
    return std::all_of(bytes, bytes + guard, is_guard) &&
           std::all_of(bytes + all - guard, bytes + all, is_guard);
  }

 private:
  static constexpr size_t kGuard = 64;  // keeps the alignment of 64 elements' bytes
  size_t n_;
  std::vector<T> storage_;
};

// [B, W, Hq, D] unit normals in the case's type; of `steps`: small multiples of 1/8 instead.
inline std::vector<uint8_t> make_queries(const Case& c, int positions, uint64_t seed,
                                         bool steps = false) {
  const size_t n = c.cache.encoded.size() * static_cast<size_t>(positions) *
                   static_cast<size_t>(c.cache.num_kv_heads * c.group * c.cache.head_dim);
  std::vector<uint8_t> q(n * static_cast<size_t>(sikv_dtype_bytes(c.cache.dtype)));
  Random random(derive_seed(c.cache.seed, seed));
  for (size_t i = 0; i < n; ++i) {
    const float x = steps ? static_cast<float>(random.below(17)) / 8.0f - 1.0f
                          : static_cast<float>(random.normal());
    sikv_store(q.data(), c.cache.dtype, static_cast<int64_t>(i), x);
  }
  return q;
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_CONFORMANCE_CASES_H_
