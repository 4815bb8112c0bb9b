// Any bytes are judged without harm, both as a library file and as a bare descriptor.
#include <cstddef>
#include <cstdint>
#include <span>

#include "framework/base/error.h"
#include "framework/registry/judge.h"

namespace {

void judge(std::span<const std::byte> descriptor) {
  sikv::judge_descriptor(sikv::read_descriptor(descriptor), sikv::cpu_only);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(data, size));
  try {
    judge(bytes);
  } catch (const sikv::Error&) {
  }
  try {
    judge(sikv::find_descriptor(bytes));
  } catch (const sikv::Error&) {
  }
  return 0;
}
