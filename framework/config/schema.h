// JSON Schema of the config, made from the registry: editors complete and check configs with it.
#ifndef SIKV_FRAMEWORK_CONFIG_SCHEMA_H_
#define SIKV_FRAMEWORK_CONFIG_SCHEMA_H_

#include <nlohmann/json_fwd.hpp>

#include "framework/registry/registry.h"

namespace sikv {

// Draft 2020-12. What parse_config refuses by value or name, the schema refuses too; conditions
// between fields (heads that divide, files that exist) are left to parse_config.
nlohmann::json config_schema(const Registry& registry);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CONFIG_SCHEMA_H_
