// A loop over all workers of a device.
#ifndef SIKV_FRAMEWORK_DEVICE_PARALLEL_H_
#define SIKV_FRAMEWORK_DEVICE_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <exception>

#include "framework/device/device.h"

namespace sikv {

// body(i, worker) for i in [0, n). The first exception a body throws comes out here, after all
// others are done: it must not cross the host's C callback.
template <typename Body>
void parallel_for(Device& device, int64_t n, Body&& body) {
  struct Shared {
    Body& body;
    std::exception_ptr error;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
  } shared{body, nullptr};
  device.host().parallel_for(
      device.host().context, n,
      [](void* arg, int64_t i, int32_t worker) {
        auto& shared = *static_cast<Shared*>(arg);
        try {
          shared.body(i, worker);
        } catch (...) {
          if (!shared.failed.test_and_set()) shared.error = std::current_exception();
        }
      },
      &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_DEVICE_PARALLEL_H_
