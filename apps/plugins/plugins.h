// sikv plugins: what was found, what was refused and why, and what each plugin takes.
#ifndef SIKV_APPS_PLUGINS_PLUGINS_H_
#define SIKV_APPS_PLUGINS_PLUGINS_H_

#include "apps/common/command.h"

namespace sikv {

Command add_plugins(CLI::App& app);

}  // namespace sikv

#endif  // SIKV_APPS_PLUGINS_PLUGINS_H_
