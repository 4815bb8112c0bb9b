// One call of a plugin on the device it runs on.
//
// Tests keep all memory on the host, between guards. On a CPU a call gets it as it is. On a GPU it
// gets copies of the same blocks, guards and poison included, and `finish` brings back what the
// plugin wrote: whatever is checked on the host afterwards is checked of the device's memory.
#ifndef SIKV_TESTS_SUPPORT_DEVICE_CALL_H_
#define SIKV_TESTS_SUPPORT_DEVICE_CALL_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "framework/device/device.h"
#include "tests/support/guarded.h"
#include "tests/support/test_cache.h"
#include "tests/support/test_rows.h"

namespace sikv::testing {

class DeviceCall {
 public:
  explicit DeviceCall(Device& device);
  ~DeviceCall();
  DeviceCall(const DeviceCall&) = delete;
  DeviceCall& operator=(const DeviceCall&) = delete;

  void* stream() const { return device_.stream(); }

  // What the device reads.
  template <typename T>
  const T* in(const T* host, size_t count) {
    return static_cast<const T*>(place(const_cast<T*>(host), count * sizeof(T), Way::kIn));
  }
  template <typename T>
  const T* in(const std::vector<T>& host) {
    return in(host.data(), host.size());
  }
  sikv_rows rows(const RowsPart& part);

  // What it reads and writes.
  template <typename T>
  T* out(Guarded<T>& memory) {
    const std::span<uint8_t> all = memory.storage();
    auto* placed = static_cast<uint8_t*>(place(all.data(), all.size(), Way::kBoth));
    return reinterpret_cast<T*>(placed + memory.offset());
  }
  // On a GPU with the fault that `finish` reads, and the codecs attached for it.
  const sikv_cache_view& view(const TestCache& cache);

  // Waits, then copies back. Error if the device refused a number.
  void finish();

 private:
  enum class Way { kIn, kBoth };
  struct Block {
    uint8_t* host;
    uint8_t* device;
    size_t bytes;
    Way way;
    void* allocation;
    size_t allocated;
  };

  bool on_host() const { return device_.info().type == SIKV_CPU; }
  void* place(void* host, size_t bytes, Way way);
  // Where the device has the byte at `host`; it must lie in a block that was placed.
  template <typename T>
  T* at(T* host) const {
    return static_cast<T*>(address(const_cast<std::remove_const_t<T>*>(host)));
  }
  void* address(void* host) const;

  Device& device_;
  std::vector<Block> blocks_;
  sikv_cache_view view_{};
  sikv_fault fault_{};
};

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_DEVICE_CALL_H_
