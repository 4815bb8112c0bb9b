// The twilight selector, private to this folder: its options, its copy of the keys and its variants.
#ifndef SIKV_SELECTORS_TWILIGHT_TWILIGHT_H_
#define SIKV_SELECTORS_TWILIGHT_TWILIGHT_H_

#include <cstdint>
#include <memory>
#include <span>

#include "plugins/sdk/plugin.h"

namespace sikv::twilight {

inline constexpr sikv_option_spec kOptions[] = {
    float_option("p", "0.85", 0, 1,
                 "share of the estimated attention mass to keep, pinned tokens and tail included"),
    selector_option("whose selection is pruned: give it a generous budget"),
};

// The copy of one key, 4 bits a channel with one scale per token:
//
//   byte 0..3        scale = (max - min) / 15, fp32
//   byte 4..7        min, fp32
//   byte 8 + i       channel i in the low nibble, channel D/2 + i in the high one, i in [0, D/2)
//
//   channel = min + scale * code
inline constexpr int kHeaderBytes = 8;
constexpr int copy_bytes(int head_dim) { return kHeaderBytes + head_dim / 2; }

void write_copy(const float* key, int head_dim, uint8_t* copy);

// Keys in the input type, `stride` elements apart, from element `first` on.
struct ExactKeys {
  const void* data;
  int32_t dtype;
  int64_t first, stride;
  int count;
};

// What the variants do differently. Queries are [G, D], times the logits' scale; logits [G, stride].
struct Math {
  // Of copies, by position in `copies`.
  void (*copy_logits)(const uint8_t* copies, std::span<const int32_t> positions, const float* q,
                      int group, int head_dim, float* logits, int64_t stride);
  void (*exact_logits)(const ExactKeys& keys, const float* q, int group, int head_dim,
                       float* logits, int64_t stride);
  // weights [n] = mean over the heads of the softmax of their n logits, which are overwritten.
  void (*mean_softmax)(float* logits, int64_t stride, int group, int64_t n, float* weights);
  // The fewest of weights [n] that have a sum of `mass` or more, all if they do not reach it:
  // kept [n] = 1 or 0. Heaviest first, the lower index first among equals.
  void (*smallest_set)(std::span<const float> weights, double mass, uint8_t* kept);
};

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const Math& math);

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args);
std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args);
int32_t probe_cpu(const sikv_device* device, sikv_message* reason);

}  // namespace sikv::twilight

#endif  // SIKV_SELECTORS_TWILIGHT_TWILIGHT_H_
