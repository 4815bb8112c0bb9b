// A loop over all workers of a device.
#ifndef SIKV_FRAMEWORK_MODEL_PARALLEL_H_
#define SIKV_FRAMEWORK_MODEL_PARALLEL_H_

#include <cstdint>
#include <type_traits>

#include "framework/device/device.h"

namespace sikv {

// body(i, worker) for i in [0, n); it must not throw.
template <typename Body>
void parallel_for(Device& device, int64_t n, Body&& body) {
  device.host().parallel_for(
      device.host().context, n,
      [](void* arg, int64_t i, int32_t worker) {
        (*static_cast<std::remove_reference_t<Body>*>(arg))(i, worker);
      },
      &body);
}

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_PARALLEL_H_
