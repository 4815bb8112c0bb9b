// sikv eval CONFIG...: what pipelines do to what a real model says.
#ifndef SIKV_APPS_EVAL_EVAL_H_
#define SIKV_APPS_EVAL_EVAL_H_

#include "apps/common/command.h"

namespace sikv {

Command add_eval(CLI::App& app, const std::vector<std::string>& command_line);

}  // namespace sikv

#endif  // SIKV_APPS_EVAL_EVAL_H_
