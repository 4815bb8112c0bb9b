// sikv compare CONFIG...: pipelines and budgets side by side on the same input.
#ifndef SIKV_APPS_COMPARE_COMPARE_H_
#define SIKV_APPS_COMPARE_COMPARE_H_

#include "apps/common/command.h"

namespace sikv {

Command add_compare(CLI::App& app, const std::vector<std::string>& command_line);

}  // namespace sikv

#endif  // SIKV_APPS_COMPARE_COMPARE_H_
