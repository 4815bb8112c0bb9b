#include "selectors/snapkv/snapkv.h"

namespace sikv::snapkv {

std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args) {
  return make(args, *simd_window_math());
}

}  // namespace sikv::snapkv
