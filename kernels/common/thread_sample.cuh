// Which tokens of a prompt a fit reads (plugins/layouts/paged_sum.h, FitSample), on the device.
#ifndef SIKV_KERNELS_COMMON_THREAD_SAMPLE_CUH_
#define SIKV_KERNELS_COMMON_THREAD_SAMPLE_CUH_

#include "plugins/layouts/paged_sum.h"

namespace sikv::cuda {

// Walks the positions of sample entries i, i + 1, i + 2 ... : one division to start with, none
// after.
class SampleWalk {
 public:
  __device__ SampleWalk(const FitSample& sample, int i)
      : size_(sample.size),
        step_(sample.count / sample.size),
        rest_step_(sample.count % sample.size) {
    const int64_t product = int64_t{i} * sample.count;
    position_ = static_cast<int32_t>(product / sample.size);
    rest_ = static_cast<int32_t>(product % sample.size);
  }
  __device__ int32_t position() const { return position_; }
  __device__ void advance() {
    position_ += step_;
    rest_ += rest_step_;
    if (rest_ >= size_) {
      rest_ -= size_;
      ++position_;
    }
  }

 private:
  int32_t size_, step_, rest_step_, position_, rest_;
};

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_THREAD_SAMPLE_CUH_
