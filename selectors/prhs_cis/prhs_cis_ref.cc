#include "selectors/prhs_cis/prhs_cis.h"

namespace sikv::prhs_cis {

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return make_selector(args, scalar_scorer);
}

}  // namespace sikv::prhs_cis
