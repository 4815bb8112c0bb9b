// sikv explain CONFIG: what would run, why, and the memory it would take; runs nothing.
#ifndef SIKV_APPS_EXPLAIN_EXPLAIN_H_
#define SIKV_APPS_EXPLAIN_EXPLAIN_H_

#include "apps/common/command.h"

namespace sikv {

Command add_explain(CLI::App& app);

}  // namespace sikv

#endif  // SIKV_APPS_EXPLAIN_EXPLAIN_H_
