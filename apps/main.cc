// The command line: parses, runs one subcommand, and turns what it throws into one line on stderr
// and an exit code.
//
//   0    done                       70   a bug in sikv
//   2    the caller's fault         130  interrupted; what was finished is kept
#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <new>

#include "apps/common/command.h"
#include "apps/compare/compare.h"
#include "apps/dataset/dataset.h"
#include "apps/eval/eval.h"
#include "apps/explain/explain.h"
#include "apps/generate/generate.h"
#include "apps/new_plugin/new_plugin.h"
#include "apps/plugins/plugins.h"
#include "apps/run/run.h"
#include "apps/schema/schema.h"
#include "apps/throughput/throughput.h"
#include "framework/base/error.h"
#include "framework/base/interrupt.h"
#include "framework/base/log.h"
#include "framework/base/text.h"
#include "framework/report/environment.h"

namespace sikv {
namespace {

// The subcommand that the words on the command line got to.
const CLI::App* innermost(const CLI::App* app) {
  for (auto parsed = app->get_subcommands(); !parsed.empty(); parsed = app->get_subcommands()) {
    app = parsed.back();
  }
  return app;
}

// "sikv dataset synth"
std::string full_name(const CLI::App* app) {
  const CLI::App* parent = app->get_parent();
  return parent == nullptr ? app->get_name() : full_name(parent) + " " + app->get_name();
}

// One sentence about the first word that the parser could not place, or about what it missed.
[[noreturn]] void refuse(const CLI::App& root, const CLI::ParseError& error) {
  const CLI::App* app = innermost(&root);
  const std::string command = full_name(app);
  const std::vector<std::string> left = root.remaining(true);
  if (left.empty()) {
    std::string text = error.what();
    std::replace(text.begin(), text.end(), '\n', ' ');
    throw Error("{}; see {} --help", text, command);
  }
  const std::string word = left[0].substr(0, left[0].find('='));
  std::vector<std::string> options, commands;
  for (const CLI::Option* option : app->get_options()) {
    for (const std::string& name : option->get_lnames()) options.push_back("--" + name);
  }
  for (const CLI::App* sub : app->get_subcommands([](const CLI::App*) { return true; })) {
    commands.push_back(sub->get_name());
  }
  if (word.starts_with('-') || commands.empty()) {
    throw Error("{} takes no '{}'{}; see {} --help", command, word, did_you_mean(word, options),
                command);
  }
  const std::string near = did_you_mean(word, commands);
  throw Error("{} has no command '{}'{}", command, word,
              near.empty() ? "; there are " + join(commands) : near);
}

int run(int argc, char** argv) {
  std::vector<std::string> command_line(argv, argv + argc);
  command_line[0] = "sikv";  // wherever it lies
  CLI::App root("sikv: self-indexing KV caches, composed from plugins and measured", "sikv");
  root.set_version_flag("--version", "sikv " + version() + " (" + commit() + ")");
  std::string log_level;
  root.add_option("--log", log_level, "trace, debug, info, warn, error or off")->type_name("LEVEL");
  root.require_subcommand(1);
  const std::vector<Command> commands = {
      add_run(root, command_line),
      add_compare(root, command_line),
      add_throughput(root, command_line),
#ifdef SIKV_HAS_MODEL
      add_eval(root, command_line),
      add_generate(root),
#endif
      add_explain(root),
      add_plugins(root),
      add_dataset(root),
      add_schema(root),
      add_new_plugin(root),
  };
  root.footer(examples({
      "sikv run configs/self_index.yaml",
      "sikv compare configs/reference.yaml --json reference.json",
      "sikv plugins show self_index",
      "sikv COMMAND --help",
  }));
  try {
    root.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() != 0) refuse(root, error);
    return root.exit(error);
  }
  if (!log_level.empty()) set_log_level(log_level);
  for (const Command& command : commands) {
    if (command.app->parsed()) command.run();
  }
  return 0;
}

int fail(int code, const char* text) {
  std::fflush(stdout);
  std::fprintf(stderr, "sikv: %s\n", text);
  return code;
}

int guarded(int argc, char** argv) {
  // Too large a file is then an error to report, like a full disk.
  std::signal(SIGXFSZ, SIG_IGN);
  install_interrupt_handler();
  try {
    const int code = run(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      return fail(Error::kExitCode, "cannot write to standard output: is the disk full?");
    }
    return code;
  } catch (const Error& error) {
    return fail(Error::kExitCode, error.what());
  } catch (const Interrupted& interrupted) {
    return fail(Interrupted::kExitCode, interrupted.what());
  } catch (const std::bad_alloc&) {
    return fail(Error::kExitCode, "out of memory: lower the batch, the context or the layers");
  } catch (const std::exception& error) {
    return fail(InternalError::kExitCode, error.what());
  }
}

}  // namespace
}  // namespace sikv

int main(int argc, char** argv) { return sikv::guarded(argc, argv); }
