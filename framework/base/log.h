// The process's log: stderr, warnings and worse unless asked for more. Library code reports through
// exceptions and return values; the log is for what has no other way out.
#ifndef SIKV_FRAMEWORK_BASE_LOG_H_
#define SIKV_FRAMEWORK_BASE_LOG_H_

#include <spdlog/logger.h>

#include <string_view>

namespace sikv {

spdlog::logger& log();

// trace, debug, info, warn, error or off; anything else is an Error.
void set_log_level(std::string_view level);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_BASE_LOG_H_
