// Small integers that the host keeps and kernels read: page tables, lengths, positions.
//
// On the CPU both are the same memory. On a GPU the host's copy is the one that counts; what it
// edited goes to the device when the device's address is next asked for. Where a kernel makes the
// same change by itself (a step appends one token to every sequence), the host only follows.
#ifndef SIKV_FRAMEWORK_CACHE_MIRRORED_ARRAY_H_
#define SIKV_FRAMEWORK_CACHE_MIRRORED_ARRAY_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "framework/device/device.h"

namespace sikv {

class MirroredArray {
 public:
  MirroredArray() = default;
  MirroredArray(Device& device, size_t size, int32_t value) : device_(&device), host_(size, value) {
    if (device.is_cuda()) copy_ = DeviceBuffer(device, size * sizeof(int32_t));
    dirty_end_ = size;
  }

  size_t size() const { return host_.size(); }
  bool empty() const { return host_.empty(); }
  int32_t operator[](size_t i) const { return host_[i]; }
  const int32_t* host() const { return host_.data(); }

  // Elements [first, first + count), to be written at once.
  int32_t* edit(size_t first, size_t count) {
    dirty_first_ = dirty_first_ == dirty_end_ ? first : std::min(dirty_first_, first);
    dirty_end_ = std::max(dirty_end_, first + count);
    return host_.data() + first;
  }
  int32_t& edit(size_t i) { return *edit(i, 1); }
  // The same for a change that the device's copy undergoes without the host.
  int32_t* follow() { return host_.data(); }
  // Takes over what kernels wrote; waits for them.
  void pull() {
    if (copy_.bytes() > 0) device_->copy_out(host_.data(), copy_.as<>(), copy_.bytes());
  }

  // The device's address; its contents are up to date for work enqueued from here on.
  int32_t* device() const {
    if (copy_.bytes() == 0) return const_cast<int32_t*>(host_.data());
    if (dirty_first_ != dirty_end_) {
      device_->copy_in(copy_.as<int32_t>() + dirty_first_, host_.data() + dirty_first_,
                       (dirty_end_ - dirty_first_) * sizeof(int32_t));
      dirty_first_ = dirty_end_ = 0;
    }
    return copy_.as<int32_t>();
  }

 private:
  Device* device_ = nullptr;
  std::vector<int32_t> host_;
  DeviceBuffer copy_;                               // on a GPU
  mutable size_t dirty_first_ = 0, dirty_end_ = 0;  // what the copy lacks
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CACHE_MIRRORED_ARRAY_H_
