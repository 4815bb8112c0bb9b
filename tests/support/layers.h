// A cache that plays every layer of a model: selectors that share across layers see the same keys in
// each, and other queries.
#ifndef SIKV_TESTS_SUPPORT_LAYERS_H_
#define SIKV_TESTS_SUPPORT_LAYERS_H_

#include <cstdint>
#include <vector>

#include "tests/support/selector_session.h"

namespace sikv::testing {

struct Layers {
  explicit Layers(int layers, int group_size, int kv_heads = 2, int pinned = 12)
      : group(group_size),
        spec{.num_kv_heads = kv_heads,
             .encoded = {300, 70},
             .tail = {9, 40},
             .pinned = pinned,
             .layer = layers - 1},
        filled(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, tight_shape(spec, 1)),
               make_codec(SIKV_VALUE_CODEC, "fp16", {}, tight_shape(spec, 1))) {
    at(0);
  }

  void at(int layer) { const_cast<sikv_cache_view&>(filled.cache.view()).layer = layer; }
  std::vector<uint8_t> queries(int layer, int64_t step) const {
    return gaussian_queries(spec, group, 1, static_cast<uint64_t>(100 * step + layer));
  }
  std::vector<Slots> select(SelectorSession& session, int layer, int64_t step) {
    at(layer);
    return session.select(step, queries(layer, step));
  }

  int group;
  CacheSpec spec;
  FilledCache filled;
};

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_LAYERS_H_
