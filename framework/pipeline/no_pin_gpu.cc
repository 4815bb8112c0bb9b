// Stands in for pin.cu in builds without CUDA.
#include "framework/base/error.h"
#include "framework/pipeline/pin.h"

namespace sikv {

void choose_pinned_on_gpu(PinRule, int, const PinBatch&, Device&) {
  throw InternalError("a CUDA device in a build without CUDA");
}

}  // namespace sikv
