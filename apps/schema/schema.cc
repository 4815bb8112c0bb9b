#include "apps/schema/schema.h"

#include <nlohmann/json.hpp>

#include "framework/config/schema.h"
#include "framework/report/rows.h"

namespace sikv {
namespace {

struct SchemaFlags {
  PluginFlags plugins;
  std::filesystem::path out;
};

void schema(const SchemaFlags& flags) {
  const std::string text = config_schema(flags.plugins.open()).dump(2) + "\n";
  if (flags.out.empty()) {
    print(text);
  } else {
    check_replaceable(flags.out, "{", "a JSON schema");
    write_text(flags.out, text);
  }
}

}  // namespace

Command add_schema(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "schema", "The JSON schema of configs, made from the plugins that are there");
  auto flags = std::make_shared<SchemaFlags>();
  add_output_option(*command, "--out", flags->out, "writes it there instead of printing it");
  flags->plugins.add_to(*command);
  command->footer(examples({
      "sikv schema --out sikv.schema.json",
      "sikv schema --plugin-path my_selector/build/lib/sikv/plugins",
  }));
  return {command, [flags] { schema(*flags); }};
}

}  // namespace sikv
