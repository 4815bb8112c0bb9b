#include "selectors/hshare/hshare.h"

namespace sikv::hshare {

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) { return make(args, *simd_row_math()); }

}  // namespace sikv::hshare
