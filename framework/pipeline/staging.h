// Input as the device reads it: in place where it lies on the device, else copied there.
#ifndef SIKV_FRAMEWORK_PIPELINE_STAGING_H_
#define SIKV_FRAMEWORK_PIPELINE_STAGING_H_

#include <array>
#include <cstddef>

#include "framework/cache/mirrored_array.h"
#include "framework/device/device.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {

class Staging {
 public:
  static constexpr int kInputs = 4;  // K, V, q, w_o

  explicit Staging(Device& device) : device_(&device) {}

  // `bytes` at `data`; valid until input i is brought again.
  const void* bring(int i, const void* data, size_t bytes);
  // Rows of B sequences and H heads of D, with `first` and `count` on the host.
  sikv_rows bring_rows(int i, const sikv_rows& rows, int B, int H, int D);
  // Gives the copies back.
  void clear();

 private:
  Device* device_;
  std::array<DeviceBuffer, kInputs> copies_;
  std::array<MirroredArray, kInputs> first_, count_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_PIPELINE_STAGING_H_
