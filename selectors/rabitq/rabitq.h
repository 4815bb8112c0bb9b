// The rabitq selector, private to this folder: its options, its code of a key and its variants.
#ifndef SIKV_SELECTORS_RABITQ_RABITQ_H_
#define SIKV_SELECTORS_RABITQ_RABITQ_H_

#include <memory>

#include "kernels/common/key_selector.h"
#include "kernels/common/sign_codes.h"
#include "plugins/layouts/rotation.h"

namespace sikv::rabitq {

inline constexpr sikv_option_spec kOptions[] = {
    budget_option("budget", "2048",
                  "tokens to select: a count, or a fraction of the sequence's current length"),
    int_option("query_bits", "4", 1, 8, "of a channel of the rotated query"),
    bool_option("center_queries", "true",
                "take the prompt's mean query off, too: a shift per token and query head is kept"),
    kFitTokensOption,
};

// What is kept of a key k, with the row's centre c and the rotation R, y = R (k - c):
//   signs of y; factor = |y|^2 / sum_i |y_i|.
// Then factor * <R q, signs> is an estimate of <q, k - c>, without bias over rotations.
struct Code {
  float y[kMaxHeadDim];
  float factor;
};
inline Code encode(const float* key, const float* center, int head_dim) {
  Code code;
  for (int d = 0; d < head_dim; ++d) code.y[d] = key[d] - center[d];
  rotation::forward(code.y, head_dim);
  float squares = 0.0f, sum = 0.0f;
  for (int d = 0; d < head_dim; ++d) {
    squares += code.y[d] * code.y[d];
    sum += std::abs(code.y[d]);
  }
  code.factor = sum > 0.0f ? squares / sum : 0.0f;
  return code;
}

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math, SignLogits sign_logits);
std::unique_ptr<Selector> make_ref(const CreateArgs& args);
std::unique_ptr<Selector> make_cpu(const CreateArgs& args);

}  // namespace sikv::rabitq

#endif  // SIKV_SELECTORS_RABITQ_RABITQ_H_
