#include "selectors/rabitq/rabitq.h"

namespace sikv::rabitq {

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) {
  return make(args, *simd_row_math(), sign_logits_simd);
}

}  // namespace sikv::rabitq
