// Any text is a config or an Error; the schema is no concern here.
#include <cstddef>
#include <cstdint>
#include <string>

#include "framework/base/error.h"
#include "framework/config/config.h"
#include "framework/config/pipeline_text.h"
#include "framework/config/test_registry.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static sikv::Registry* const registry = new sikv::Registry(sikv::test_registry());
  // The first line is one `--set`, the rest is the file.
  const std::string input(reinterpret_cast<const char*>(data), size);
  const size_t newline = input.find('\n');
  const std::string set = newline == std::string::npos ? "" : input.substr(0, newline);
  const std::string text = input.substr(newline == std::string::npos ? 0 : newline + 1);
  // Would open libraries all over the machine.
  if (input.find("plugin_path") != std::string::npos) return 0;
  try {
    const sikv::Config config = sikv::parse_config(
        text, "fuzz.yaml", set.empty() ? std::vector<std::string>() : std::vector{set}, *registry);
    for (const sikv::PipelineSpec& spec : sikv::expand_budgets(config, *registry)) {
      const std::string line = sikv::pipeline_text(spec, *registry);
      SIKV_ASSERT(sikv::pipeline_text(sikv::parse_pipeline(line, *registry), *registry) == line);
    }
  } catch (const sikv::Error&) {
  }
  return 0;
}
