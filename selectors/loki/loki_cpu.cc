#include "selectors/loki/loki.h"

namespace sikv::loki {

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) { return make(args, *simd_row_math()); }

}  // namespace sikv::loki
