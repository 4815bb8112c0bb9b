#include "framework/device/cuda_refusal.h"

#include <fmt/format.h>

namespace sikv {
namespace {

std::string version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

}  // namespace

std::string driver_refusal(int driver, int built_with) {
  if (driver == 0) return "no NVIDIA driver is installed here; install one, or use device cpu";
  return fmt::format(
      "the NVIDIA driver serves CUDA {} and this sikv was built with {}; update the driver, or "
      "use device cpu",
      version_text(driver), version_text(built_with));
}

std::string ordinal_refusal(int ordinal, int count) {
  if (ordinal >= 0 && ordinal < count) return "";
  return fmt::format("there is no GPU {}: this host has {}, numbered from 0", ordinal, count);
}

std::string architecture_refusal(int ordinal, int architecture, int oldest) {
  if (architecture >= oldest) return "";
  return fmt::format(
      "GPU {} is sm_{} and this sikv was built for sm_{} and newer; build it with "
      "-DCMAKE_CUDA_ARCHITECTURES={}, or use device cpu",
      ordinal, architecture, oldest, architecture);
}

}  // namespace sikv
