#include "selectors/h2o/h2o.h"

namespace sikv::h2o {

std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args) {
  return make(args, *simd_window_math());
}

}  // namespace sikv::h2o
