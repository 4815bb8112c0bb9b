// Stands in for cuda_backend.cc in builds without CUDA.
#include "framework/base/error.h"
#include "framework/model/backend.h"

namespace sikv {

std::unique_ptr<ModelBackend> make_cuda_backend(ModelFile&, Device&) {
  throw InternalError("a CUDA device in a build without CUDA");
}

}  // namespace sikv
