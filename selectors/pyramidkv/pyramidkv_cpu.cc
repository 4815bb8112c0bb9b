#include "selectors/pyramidkv/pyramidkv.h"

namespace sikv::pyramidkv {

std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args) {
  return make(args, *simd_window_math());
}

}  // namespace sikv::pyramidkv
