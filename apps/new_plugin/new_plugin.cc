#include "apps/new_plugin/new_plugin.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <iterator>

#include "apps/common/kinds.h"
#include "apps/common/show.h"
#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/report/rows.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

struct NewPluginFlags {
  std::string kind, name;
  fs::path out;
};

// bin/sikv, in an install and in a build tree, has its templates in share/ beside it.
fs::path prefix() { return fs::canonical("/proc/self/exe").parent_path().parent_path(); }

void check_name(sikv_kind kind, const std::string& name) {
  const auto lower = [](char c) { return c >= 'a' && c <= 'z'; };
  const auto allowed = [&](char c) { return lower(c) || (c >= '0' && c <= '9') || c == '_'; };
  if (name.empty() || !lower(name[0]) || !std::all_of(name.begin(), name.end(), allowed)) {
    throw Error("'{}' cannot name a plugin: use lower case letters, digits and _, a letter first",
                name);
  }
  constexpr size_t kLongest = sizeof(sikv_plugin_descriptor_t::id) - 1;
  if (name.size() > kLongest) {
    throw Error("'{}' is too long for a plugin's name: {} characters at most", name, kLongest);
  }
  const std::vector<std::string> taken = Registry::standard().ids(kind);
  if (std::find(taken.begin(), taken.end(), name) != taken.end()) {
    throw Error("there is a {} '{}' already, and a second would be refused: choose another name",
                kind_name(kind), name);
  }
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

// my_key_codec -> MyKeyCodec
std::string camel_case(const std::string& name) {
  std::string camel;
  bool upper = true;
  for (const char c : name) {
    if (c != '_') camel += upper ? static_cast<char>(std::toupper(c)) : c;
    upper = c == '_';
  }
  return camel;
}

// The class of a plugin: its name, and its kind where the name does not end with it, so that ids
// such as `plan` do not shadow a class of the SDK.
std::string class_name(const std::string& name, const std::string& kind) {
  const std::string base = camel_case(name), suffix = camel_case(kind);
  return base.ends_with(suffix) && base != suffix ? base : base + suffix;
}

void new_plugin(const NewPluginFlags& flags) {
  check_name(parse_kind(flags.kind), flags.name);
  const fs::path templates = prefix() / "share" / "sikv" / "templates" / flags.kind;
  if (!fs::is_directory(templates)) {
    throw Error("there is no template {}: install sikv completely", templates.string());
  }
  const fs::path out = flags.out.empty() ? fs::path(flags.name) : flags.out;
  if (fs::exists(out)) {
    throw Error("{} is there already: remove it, or name another folder with --out", out.string());
  }
  std::error_code failed;
  if (!fs::create_directories(out, failed)) {
    throw Error("cannot create {}: {}; name another folder with --out", out.string(),
                failed.message());
  }
  const std::string placeholder = "my_" + flags.kind;
  const auto renamed = [&](const std::string& text) {
    return replaced(replaced(text, placeholder, flags.name), camel_case(placeholder),
                    class_name(flags.name, flags.kind));
  };
  for (const fs::directory_entry& entry : fs::directory_iterator(templates)) {
    std::ifstream stream(entry.path());
    const std::string text{std::istreambuf_iterator<char>(stream), {}};
    write_text(out / renamed(entry.path().filename().string()), renamed(text));
  }
  print(
      fmt::format("{0}: a {1} that works. To build, test and use it:\n"
                  "  cmake -S {0} -B {0}/build -DCMAKE_PREFIX_PATH={2}\n"
                  "  cmake --build {0}/build\n"
                  "  ctest --test-dir {0}/build\n"
                  "  {2}/bin/sikv plugins show {3} --plugin-path {0}/build/lib/sikv/plugins\n",
                  out.string(), spaced(flags.kind), prefix().string(), flags.name));
}

}  // namespace

Command add_new_plugin(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "new-plugin", "Writes a working plugin to start from: source, build, test, README");
  auto flags = std::make_shared<NewPluginFlags>();
  command->add_option("KIND", flags->kind, kind_names())->required();
  command->add_option("NAME", flags->name, "its id, such as my_selector")->required();
  command->add_option("--out", flags->out, "the folder to create; NAME if not given")
      ->type_name("DIR");
  command->footer(examples({
      "sikv new-plugin selector my_selector",
      "sikv new-plugin key_codec int8_keys --out plugins/int8_keys",
  }));
  return {command, [flags] { new_plugin(*flags); }};
}

}  // namespace sikv
