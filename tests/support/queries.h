// Queries and shapes that go with a test cache.
#ifndef SIKV_TESTS_SUPPORT_QUERIES_H_
#define SIKV_TESTS_SUPPORT_QUERIES_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "framework/base/random.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {

// The cache's own batch and lengths, so that what plans by the shape has no slack.
inline sikv_shape tight_shape(const CacheSpec& spec, int group) {
  sikv_shape shape = make_shape(spec.head_dim, spec.dtype, spec.num_kv_heads, group);
  shape.num_layers = spec.layer + 1;
  shape.max_sequences = static_cast<int32_t>(spec.encoded.size());
  shape.max_tokens = 1;
  for (size_t b = 0; b < spec.encoded.size(); ++b) {
    const int tail = b < spec.tail.size() ? spec.tail[b] : 0;
    shape.max_tokens = std::max(shape.max_tokens, spec.encoded[b] + tail);
  }
  shape.max_tokens += spec.slack;
  return shape;
}

// The same numbers, rounded to `dtype`.
inline std::vector<uint8_t> to_dtype(std::span<const float> x, int32_t dtype) {
  std::vector<uint8_t> bytes(x.size() * static_cast<size_t>(sikv_dtype_bytes(dtype)));
  for (size_t i = 0; i < x.size(); ++i) {
    sikv_store(bytes.data(), dtype, static_cast<int64_t>(i), x[i]);
  }
  return bytes;
}

// [B, positions, Hq, D] unit normals in the cache's type.
inline std::vector<uint8_t> gaussian_queries(const CacheSpec& spec, int group, int positions,
                                             uint64_t seed) {
  std::vector<float> q(spec.encoded.size() * static_cast<size_t>(positions) *
                       static_cast<size_t>(spec.num_kv_heads * group * spec.head_dim));
  Random random(seed);
  for (float& x : q) x = static_cast<float>(random.normal());
  return to_dtype(q, spec.dtype);
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_QUERIES_H_
