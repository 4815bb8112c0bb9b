// The hisa selector, private to this folder: its options and its variants.
#ifndef SIKV_SELECTORS_HISA_HISA_H_
#define SIKV_SELECTORS_HISA_HISA_H_

#include <cstdint>
#include <memory>
#include <span>

#include "kernels/common/key_selector.h"

namespace sikv::hisa {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_choice_option("block_tokens", "128", "16|32|64|128|256",
                      "neighbouring tokens that share one pooled key"),
    int_option("blocks", "64", 0, 1 << 20,
               "whose tokens are scored, the first and the last among them; 0: a quarter of all; "
               "more where the budget needs them"),
};

// q . k of the two levels.
struct LevelMath {
  // out [count] of rows [count, D].
  void (*pooled)(const float* rows, int64_t count, int head_dim, const float* q, float* out);
  // out [slots.size()] of keys as the cache stores them.
  void (*stored)(const CacheView& view, int row, std::span<const int32_t> slots, const float* q,
                 float* out);
};

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math,
                               const LevelMath& levels);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::hisa

#endif  // SIKV_SELECTORS_HISA_HISA_H_
