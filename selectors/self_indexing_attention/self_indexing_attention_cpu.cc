#include "selectors/self_indexing_attention/self_indexing_attention.h"

namespace sikv::self_indexing_attention {

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) {
  return make(args, *simd_row_math(), sign_logits_simd);
}

}  // namespace sikv::self_indexing_attention
