#include "selectors/prhs_cis/prhs_cis.h"

namespace sikv::prhs_cis {

std::unique_ptr<Selector> make_cpu(const CreateArgs& args) {
  return make_selector(args, simd_scorer);
}

int32_t probe_cpu(const sikv_device*, sikv_message* reason) {
  if (simd_scorer_runs()) return 10;
  sdk::write_message(reason, "the processor has no vector instructions that Highway supports");
  return 0;
}

}  // namespace sikv::prhs_cis
