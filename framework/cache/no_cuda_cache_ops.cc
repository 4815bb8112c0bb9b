// Stands in for cache_ops.cu in builds without CUDA.
#include "framework/base/error.h"
#include "framework/cache/cache_ops.h"

namespace sikv {

std::unique_ptr<CacheOps> make_cuda_cache_ops(Device&) {
  throw InternalError("a CUDA device in a build without CUDA");
}

}  // namespace sikv
