// What a result was made with. Heads every JSON file, so that a number can be traced to the code,
// the machine and the command line behind it.
#ifndef SIKV_FRAMEWORK_REPORT_ENVIRONMENT_H_
#define SIKV_FRAMEWORK_REPORT_ENVIRONMENT_H_

#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "framework/device/device.h"

namespace sikv {

// "0.1.0"
std::string version();
// The last that changed what sikv is built from, abbreviated, with "-dirty" behind it where that was
// edited since; "unknown" outside a repository.
std::string commit();

nlohmann::ordered_json environment(std::span<const std::string> command_line, const Device& device);

// Whether numbers made in both may stand side by side: same code, build, machine and device; date
// and command line may differ.
bool same_environment(const nlohmann::ordered_json& a, const nlohmann::ordered_json& b);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REPORT_ENVIRONMENT_H_
