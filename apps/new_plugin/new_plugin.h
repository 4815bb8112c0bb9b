// sikv new-plugin KIND NAME: a working plugin of its own, to start from.
#ifndef SIKV_APPS_NEW_PLUGIN_NEW_PLUGIN_H_
#define SIKV_APPS_NEW_PLUGIN_NEW_PLUGIN_H_

#include "apps/common/command.h"

namespace sikv {

Command add_new_plugin(CLI::App& app);

}  // namespace sikv

#endif  // SIKV_APPS_NEW_PLUGIN_NEW_PLUGIN_H_
