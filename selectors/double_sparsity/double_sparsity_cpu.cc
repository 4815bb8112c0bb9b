#include "selectors/double_sparsity/double_sparsity.h"

namespace sikv::double_sparsity {

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) { return make(args, *simd_row_math()); }

}  // namespace sikv::double_sparsity
