// Names of the element types, as written in options and layout parameters.
#ifndef SIKV_PLUGINS_LAYOUTS_DTYPE_NAME_H_
#define SIKV_PLUGINS_LAYOUTS_DTYPE_NAME_H_

#include <string_view>

#include "plugins/abi/sikv_dtype.h"

namespace sikv {

constexpr std::string_view dtype_name(int32_t dtype) {
  constexpr std::string_view kNames[] = {"fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2"};
  return dtype >= 0 && dtype < 5 ? kNames[dtype] : "unknown";
}

// The type with this name, or -1.
constexpr int32_t dtype_from_name(std::string_view name) {
  for (int32_t dtype = SIKV_FP32; dtype <= SIKV_FP8_E5M2; ++dtype) {
    if (dtype_name(dtype) == name) return dtype;
  }
  return -1;
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_LAYOUTS_DTYPE_NAME_H_
