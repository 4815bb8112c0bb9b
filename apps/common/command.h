// What the subcommands share: how they register, the flags of those that take a config, and the
// devices their pipelines run on.
#ifndef SIKV_APPS_COMMON_COMMAND_H_
#define SIKV_APPS_COMMON_COMMAND_H_

#include <CLI/CLI.hpp>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/experiment/measure.h"
#include "framework/registry/registry.h"

namespace sikv {

// A subcommand: its parser, and what to do once the whole command line has been parsed. Output goes
// to stdout through print(); everything wrong is thrown.
struct Command {
  CLI::App* app;
  std::function<void()> run;
};

// Adds `text` to stdout; a failure is found by the program at its end.
void print(const std::string& text);
// One line on stderr that does not stop the program; the same one only once.
void note(const std::string& text);

// What a user may not expect of a measured pipeline and its input, as notes: a part of the config
// that the source leaves unused, a budget that selects everything, a prompt that fills no page.
void note_surprises(const Config& config, const Source& source, const Measured& measured);

// A note if `pinned` takes all that a prompt has.
void note_pins(const PipelineSpec& spec, int64_t prompt);

// What commands that take the first context and batch of a synthetic source alone leave out, as in
// "context 8192 and batch 4, 8"; empty if nothing.
std::string left_of_sweep(const Config& config);
// The same as a note, before anything is measured.
void note_left_of_sweep(const Config& config);

// The plugins of the install, of SIKV_PLUGIN_PATH and of --plugin-path.
class PluginFlags {
 public:
  void add_to(CLI::App& app);
  Registry open() const;

 private:
  std::vector<std::filesystem::path> folders_;
};

// --set, --force, --plugin-path, --threads, --device.
class ConfigFlags {
 public:
  void add_to(CLI::App& app);
  Registry open_registry() const { return plugins_.open(); }
  // The config with the flags applied to it and to each of its pipelines.
  Config load(const std::filesystem::path& file, Registry& registry,
              SourceUse source = SourceUse::kRead) const;

 private:
  void force(Config& config, const std::string& assignment, const Registry& registry) const;

  PluginFlags plugins_;
  std::vector<std::string> sets_, forces_;
  std::optional<int> threads_;
  std::string device_;
};

// The devices that the pipelines of one run name, each opened once.
class Devices {
 public:
  explicit Devices(int threads) : threads_(threads) {}
  // "cpu", "cuda" or "cuda:N"; Error if there is none.
  Device& open(const std::string& name);
  // The one a pipeline names. `auto` is the GPU where there is one that every part has a variant
  // for, else the CPU.
  Device& open(const PipelineSpec& spec, const Registry& registry);

 private:
  int threads_;
  std::map<std::string, std::unique_ptr<Device>> open_;
};

// The words a command's examples end its help with.
std::string examples(const std::vector<std::string>& lines);

// Options that most commands have.
void add_config_argument(CLI::App& app, std::filesystem::path& file);
void add_output_option(CLI::App& app, const char* name, std::filesystem::path& file,
                       const char* help);
// Error naming two of a command's output options that would write the same file, however it is spelt;
// an option that was not given is an empty path.
void check_own_files(std::initializer_list<std::pair<const char*, std::filesystem::path>> outputs);

}  // namespace sikv

#endif  // SIKV_APPS_COMMON_COMMAND_H_
