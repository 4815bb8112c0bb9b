// The saap selector, private to this folder: its options, its query network and its variants.
#ifndef SIKV_SELECTORS_SAAP_SAAP_H_
#define SIKV_SELECTORS_SAAP_SAAP_H_

#include <memory>
#include <string>
#include <vector>

#include "kernels/common/key_selector.h"
#include "kernels/common/rope.h"

namespace sikv::saap {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_option("clusters", "0", 0, 1024,
               "buckets of keys; 0: one per 16 tokens of the prompt, at most 1024"),
    int_option("iterations", "10", 1, 100, "of k-means, at most"),
    kRopeOption,
    text_option("network", "",
                "file of centroids and query networks, as datasets/capture/train_saap.py writes "
                "it; empty: k-means on the prompt, and queries compared with its centroids"),
    kFitTokensOption,
};

// What the variants do differently.
struct Math {
  // y [n] = x [m] W + b, W [m, n]; b may be null.
  void (*affine)(const float* x, int m, const float* w, const float* b, int n, float* y);
  // out [tokens] = values[buckets[t]].
  void (*spread)(const uint16_t* buckets, int64_t tokens, const float* values, float* out);
};

// Centroids of every KV head, and a network of two layers for every query head:
//
//   char[8]  "SIKVSAP1"
//   uint32   L layers, H KV heads, Hq query heads, D channels, C centroids, M hidden units,
//            rope (0 kept, 1 half, 2 interleaved), 0
//   fp32     per layer: centroids [H, C, D] of norm 1; per query head W1 [D, M], b1 [M],
//            W2 [M, C], b2 [C]
//
// Little-endian, and nothing behind it.
struct Network {
  int heads = 0, query_heads = 0, dim = 0, clusters = 0, hidden = 0;
  std::vector<float> data;

  int64_t head_floats() const {
    return int64_t{dim} * hidden + hidden + int64_t{hidden} * clusters + clusters;
  }
  int64_t layer_floats() const {
    return int64_t{heads} * clusters * dim + query_heads * head_floats();
  }
  const float* centroids(int layer, int head) const {
    return data.data() + layer * layer_floats() + int64_t{head} * clusters * dim;
  }
  const float* query_head(int layer, int head) const {
    return data.data() + layer * layer_floats() + int64_t{heads} * clusters * dim +
           head * head_floats();
  }
};

// Of a model with this shape; its layers are the cache's, in the same order.
Network read_network(const std::string& path, const sikv_shape& shape, Rope rope);

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& row_math, const Math& math);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::saap

#endif  // SIKV_SELECTORS_SAAP_SAAP_H_
