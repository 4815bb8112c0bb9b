// sikv run CONFIG: one pipeline on its source, told in full.
#ifndef SIKV_APPS_RUN_RUN_H_
#define SIKV_APPS_RUN_RUN_H_

#include "apps/common/command.h"

namespace sikv {

Command add_run(CLI::App& app, const std::vector<std::string>& command_line);

}  // namespace sikv

#endif  // SIKV_APPS_RUN_RUN_H_
