// Where a pipeline runs: memory, copies, workers.
#ifndef SIKV_FRAMEWORK_DEVICE_DEVICE_H_
#define SIKV_FRAMEWORK_DEVICE_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "plugins/abi/sikv_abi.h"

namespace sikv {

class Device {
 public:
  virtual ~Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const sikv_device& info() const { return info_; }
  const sikv_host& host() const { return host_; }

  // `bytes` of zeroed memory, aligned to 64 at least. Large blocks on the CPU are reserved at once
  // but take up memory only as they are written. Error naming what was asked and what was free.
  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* data, size_t bytes) noexcept = 0;
  // Gives the system back what memory of [first, first + bytes) of a block of `block_bytes` it can
  // take; that part reads as zeros or as before. The block stays reserved. Nothing on a GPU.
  virtual void discard(void* block, size_t block_bytes, size_t first, size_t bytes) noexcept {
    static_cast<void>(block), static_cast<void>(block_bytes);
    static_cast<void>(first), static_cast<void>(bytes);
  }
  // The same with what this process freed and the allocator kept.
  virtual void trim() noexcept {}
  // In the order of the stream. copy_in may return before the copy is done, but no longer needs
  // `from` if that is ordinary memory of the host; it may lie on the device, too. copy_out waits.
  virtual void copy_in(void* to_device, const void* from, size_t bytes) = 0;
  virtual void copy_out(void* to_host, const void* from_device, size_t bytes) = 0;
  virtual void* stream() { return nullptr; }
  // Waits for everything enqueued. Error or InternalError if some of it failed.
  virtual void synchronize() {}
  // Bytes an allocation may still take.
  virtual uint64_t free_bytes() const = 0;
  // Whether kernels may read and write at `data`. On the CPU that is all memory.
  virtual bool holds(const void* data) const { return static_cast<void>(data), true; }
  bool is_cuda() const { return info_.type == SIKV_CUDA; }

  // Times of a stage: mark(i) notes when all work enqueued so far is done; seconds(i, j) is what
  // lay between two marks, once both are over.
  virtual void mark(int i) = 0;
  virtual double seconds(int from, int to) = 0;

  // What `enqueue` puts on the stream, kept to be done again and again, on a GPU as a CUDA graph.
  // It must not wait, allocate or copy from or to the host. Only where is_cuda().
  class Recording {
   public:
    virtual ~Recording() = default;
    virtual void replay() = 0;
  };
  virtual std::unique_ptr<Recording> record(const std::function<void()>& enqueue);

 protected:
  Device() = default;
  sikv_device info_{};
  sikv_host host_{};
};

// `threads` 0 = one per core.
std::unique_ptr<Device> open_cpu_device(int threads);

// A block of device memory that frees itself.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device& device, size_t bytes)
      : device_(&device), data_(bytes == 0 ? nullptr : device.allocate(bytes)), bytes_(bytes) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    DeviceBuffer(std::move(other)).swap(*this);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) device_->release(data_, bytes_);
  }

  template <typename T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  void discard(size_t first, size_t bytes) noexcept {
    device_->discard(data_, bytes_, first, bytes);
  }

 private:
  void swap(DeviceBuffer& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_DEVICE_DEVICE_H_
