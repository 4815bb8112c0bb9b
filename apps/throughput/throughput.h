// sikv throughput CONFIG: caches of deployment size on synthetic data, filled and timed.
#ifndef SIKV_APPS_THROUGHPUT_THROUGHPUT_H_
#define SIKV_APPS_THROUGHPUT_THROUGHPUT_H_

#include "apps/common/command.h"

namespace sikv {

Command add_throughput(CLI::App& app, const std::vector<std::string>& command_line);

}  // namespace sikv

#endif  // SIKV_APPS_THROUGHPUT_THROUGHPUT_H_
