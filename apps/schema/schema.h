// sikv schema: the JSON schema of configs, for editors.
#ifndef SIKV_APPS_SCHEMA_SCHEMA_H_
#define SIKV_APPS_SCHEMA_SCHEMA_H_

#include "apps/common/command.h"

namespace sikv {

Command add_schema(CLI::App& app);

}  // namespace sikv

#endif  // SIKV_APPS_SCHEMA_SCHEMA_H_
