#include "selectors/sign_lsh/sign_lsh.h"

namespace sikv::sign_lsh {

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) {
  return make(args, *simd_row_math(), sign_logits_simd);
}

}  // namespace sikv::sign_lsh
