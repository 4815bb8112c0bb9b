#include "framework/report/environment.h"

#include <fmt/chrono.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <ctime>
#include <fstream>

#include "commit.h"

namespace sikv {
namespace {

// The value of `key` in a file of "key<separator>value" lines; empty if it is not there.
std::string field_of(const char* file, std::string_view key, char separator) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    const size_t at = line.find(separator);
    if (!line.starts_with(key) || at == std::string::npos) continue;
    std::string value = line.substr(at + 1);
    value.erase(0, value.find_first_not_of(" \t\""));
    value.erase(value.find_last_not_of(" \t\"") + 1);
    return value;
  }
  return {};
}

std::string os_text() {
  utsname name{};
  uname(&name);
  const std::string kernel = fmt::format("{} {} {}", name.sysname, name.release, name.machine);
  const std::string distribution = field_of("/etc/os-release", "PRETTY_NAME", '=');
  return distribution.empty() ? kernel : distribution + ", " + kernel;
}

std::string compiler_text() {
#ifdef __clang__
  return __VERSION__;
#else
  return "GCC " __VERSION__;
#endif
}

}  // namespace

std::string version() { return SIKV_VERSION; }

std::string commit() { return SIKV_COMMIT; }

nlohmann::ordered_json environment(std::span<const std::string> command_line,
                                   const Device& device) {
  std::string command;
  for (const std::string& word : command_line) {
    if (!command.empty()) command += ' ';
    command += word.find_first_of(" '\"$&;|<>()*") == std::string::npos ? word : "'" + word + "'";
  }
  const sikv_device& info = device.info();
  const std::string cpu = field_of("/proc/cpuinfo", "model name", ':');
  return {
      {"sikv", version()},
      {"commit", commit()},
      {"command", command},
      {"date_utc", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)))},
      {"cpu", cpu.empty() ? "unknown" : cpu},
      {"cores", sysconf(_SC_NPROCESSORS_ONLN)},
      {"memory_bytes", static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
                           static_cast<uint64_t>(sysconf(_SC_PAGESIZE))},
      {"os", os_text()},
      {"compiler", compiler_text()},
      {"build_type", SIKV_BUILD_TYPE},
      {"device",
       {{"type", info.type == SIKV_CUDA ? "cuda" : "cpu"},
        {"name", info.name},
        {"threads", info.num_threads},
        {"memory_bytes", info.memory_bytes}}},
  };
}

bool same_environment(const nlohmann::ordered_json& a, const nlohmann::ordered_json& b) {
  for (const char* key : {"sikv", "commit", "cpu", "cores", "compiler", "build_type", "device"}) {
    if (a.value(key, nlohmann::ordered_json()) != b.value(key, nlohmann::ordered_json())) {
      return false;
    }
  }
  return true;
}

}  // namespace sikv
