// Any text is a pipeline, which prints and parses back to the same text, or an Error.
#include <cstddef>
#include <cstdint>
#include <string>

#include "framework/base/error.h"
#include "framework/config/pipeline_text.h"
#include "framework/config/test_registry.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const sikv::Registry* const registry = new sikv::Registry(sikv::test_registry());
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const std::string line = sikv::pipeline_text(sikv::parse_pipeline(text, *registry), *registry);
    SIKV_ASSERT(sikv::pipeline_text(sikv::parse_pipeline(line, *registry), *registry) == line);
  } catch (const sikv::Error&) {
  }
  return 0;
}
