#include "framework/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/text.h"

namespace sikv {

spdlog::logger& log() {
  static spdlog::logger logger = [] {
    spdlog::logger made("sikv", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
    made.set_level(spdlog::level::warn);
    made.set_pattern("sikv: %^%l%$: %v");
    return made;
  }();
  return logger;
}

void set_log_level(std::string_view level) {
  static const std::vector<std::string> kLevels = {"trace", "debug", "info",
                                                   "warn",  "error", "off"};
  if (std::find(kLevels.begin(), kLevels.end(), level) == kLevels.end()) {
    throw Error("log level '{}' is not one of {}{}", level, join(kLevels),
                did_you_mean(level, kLevels));
  }
  log().set_level(spdlog::level::from_str(std::string(level)));
}

}  // namespace sikv
