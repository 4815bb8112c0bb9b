#include "selectors/sparq/sparq.h"

namespace sikv::sparq {

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) { return make(args, *simd_row_math()); }

}  // namespace sikv::sparq
