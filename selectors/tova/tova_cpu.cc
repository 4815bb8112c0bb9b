#include "selectors/tova/tova.h"

namespace sikv::tova {

std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args) {
  return make(args, *simd_window_math());
}

}  // namespace sikv::tova
