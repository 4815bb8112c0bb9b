#include "framework/registry/registry.h"

#define BOOST_DLL_USE_STD_FS
#include <dlfcn.h>

#include <algorithm>
#include <boost/dll/runtime_symbol_info.hpp>
#include <boost/dll/shared_library.hpp>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/text.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

const sikv_plugin_tables_t* open_tables(const fs::path& path) {
  namespace dll = boost::dll;
  // Variants hand out addresses inside the library for as long as the process lives: NODELETE
  // keeps it when the handle goes.
  const auto mode = dll::load_mode::rtld_now | dll::load_mode::rtld_local |
                    static_cast<dll::load_mode::type>(RTLD_NODELETE);
  dll::shared_library library;
  std::error_code failed;
  library.load(path, failed, mode);
  if (failed) {
    const char* why = dlerror();
    throw Error("it cannot be opened: {}; install what it needs or rebuild it here",
                why == nullptr ? failed.message() : why);
  }
  return library.get<const sikv_plugin_tables_t*()>("sikv_plugin_tables")();
}

// Every lib*.so of a folder, in name order.
std::vector<fs::path> libraries_in(const fs::path& folder) {
  std::error_code failed;
  std::vector<fs::path> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, failed)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("lib") && name.ends_with(".so")) files.push_back(entry.path());
  }
  if (failed) {
    throw Error("the plugin folder '{}' cannot be read: {}; correct the path", folder.string(),
                failed.message());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::vector<std::byte> read_file(const fs::path& path) {
  std::error_code failed;
  const uintmax_t size = fs::is_regular_file(path, failed) ? fs::file_size(path, failed) : 0;
  std::ifstream stream(path, std::ios::binary);
  std::vector<std::byte> bytes(failed ? 0 : size);
  stream.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (failed || !stream) throw Error("it cannot be read; check its permissions");
  return bytes;
}

// Id and kinds as the file name libsikv-<family>-<id>-<device>.so promises them.
void guess_from_name(const fs::path& path, RefusedLibrary& refused) {
  constexpr std::string_view kPrefix = "libsikv-";
  const std::string stem = path.stem().string();
  if (!stem.starts_with(kPrefix)) return;
  const std::string rest = stem.substr(kPrefix.size());
  const size_t first = rest.find('-'), last = rest.rfind('-');
  if (first == std::string::npos || first == last) return;
  const std::string family = rest.substr(0, first);
  refused.id = rest.substr(first + 1, last - first - 1);
  if (family == "codec") {
    refused.kinds = SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC);
  } else if (family == "selector") {
    refused.kinds = SIKV_KIND_BIT(SIKV_SELECTOR);
  } else if (family == "kernel") {
    refused.kinds = SIKV_KIND_BIT(SIKV_KERNEL);
  }
}

bool same_options(std::span<const sikv_option_spec> a, std::span<const sikv_option_spec> b) {
  const auto same_text = [](const char* x, const char* y) {
    return (x == nullptr) == (y == nullptr) && (x == nullptr || std::strcmp(x, y) == 0);
  };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [&](const sikv_option_spec& x, const sikv_option_spec& y) {
                      return same_text(x.name, y.name) && x.type == y.type && x.min == y.min &&
                             x.max == y.max && same_text(x.choices, y.choices) &&
                             same_text(x.default_value, y.default_value);
                    });
}

std::string_view device_name(int32_t type) { return type == SIKV_CUDA ? "CUDA" : "the CPU"; }

Candidate probe(const Variant& variant, const sikv_device& device) {
  // Checked here, because a probe that forgot to would be handed pointers of the other device.
  if (variant.device != device.type) {
    return {&variant, 0,
            fmt::format("it runs on {}, the pipeline on {}", device_name(variant.device),
                        device_name(device.type))};
  }
  auto* const probe = variant.kind == SIKV_SELECTOR ? variant.selector().probe
                      : variant.kind == SIKV_KERNEL ? variant.kernel().probe
                                                    : variant.codec().probe;
  sikv_message reason{};
  const int score = probe(&device, &reason);
  if (score > 0) return {&variant, score, ""};
  std::string text(reason.text, strnlen(reason.text, sizeof reason.text));
  return {&variant, score, text.empty() ? "it gives no reason" : text};
}

}  // namespace

std::string Variant::name() const {
  return fmt::format("{} '{}' ({})", kind_name(kind), id, variant);
}

Registry::Registry(DeviceCheck check) : check_(std::move(check)) {}

void Registry::add_folder(const fs::path& folder) {
  const std::vector<fs::path> files = libraries_in(folder);
  if (files.empty()) {
    // An install or a build folder, above that of its plugins.
    const fs::path below = folder / "lib/sikv/plugins";
    std::error_code unreadable;
    throw Error("the plugin folder '{}' holds no plugin library (lib*.so){}", folder.string(),
                fs::is_directory(below, unreadable)
                    ? "; did you mean " + below.string() + "?"
                    : "; correct the path, or build the plugin first");
  }
  for (const fs::path& file : files) add_library(file);
}

void Registry::add_library(const fs::path& path) {
  std::error_code unresolved;
  fs::path file = fs::canonical(path, unresolved);
  if (unresolved) file = path;
  if (!seen_.insert(file).second) return;

  RefusedLibrary refused{path, "", "", 0};
  guess_from_name(path, refused);
  try {
    const std::vector<std::byte> bytes = read_file(file);
    const sikv_plugin_descriptor_t descriptor = read_descriptor(find_descriptor(bytes));
    refused.id = descriptor.id;
    refused.kinds = descriptor.kinds;
    judge_descriptor(descriptor, check_);
    register_entries(path, descriptor, open_tables(file));
  } catch (const Error& error) {
    refused.reason = error.what();
    refused_.push_back(std::move(refused));
  }
}

void Registry::add_linked(const fs::path& path, const sikv_plugin_descriptor_t& descriptor,
                          const sikv_plugin_tables_t* tables) {
  try {
    judge_descriptor(read_descriptor(std::as_bytes(std::span(&descriptor, 1))), check_);
    register_entries(path, descriptor, tables);
  } catch (const Error& error) {
    refused_.push_back({path, descriptor.id, error.what(), descriptor.kinds});
  }
}

void Registry::register_entries(const fs::path& path, const sikv_plugin_descriptor_t& descriptor,
                                const sikv_plugin_tables_t* tables) {
  judge_tables(descriptor, tables);
  const std::span entries(tables->entries, tables->num_entries);
  for (const sikv_plugin_entry& entry : entries) {
    const std::span options(entry.options, entry.num_options);
    for (const Variant* other : variants_of(static_cast<sikv_kind>(entry.kind), descriptor.id)) {
      if (other->variant == entry.variant) {
        throw Error("its {} is already there, from '{}'; remove '{}' or the other", other->name(),
                    other->path.string(), path.string());
      }
      if (!same_options(other->options, options)) {
        throw Error(
            "its {} '{}' ({}) takes other options than variant '{}' in '{}'; build both "
            "from the same version",
            kind_name(other->kind), other->id, entry.variant, other->variant, other->path.string());
      }
    }
  }
  for (const sikv_plugin_entry& entry : entries) {
    tables_.push_back(full_table(entry));
    variants_.push_back({static_cast<sikv_kind>(entry.kind), descriptor.id, entry.variant,
                         descriptor.version, static_cast<sikv_device_type>(descriptor.device),
                         descriptor.architectures, descriptor.faster_paths, path,
                         std::span(entry.options, entry.num_options), &tables_.back()});
  }
}

Registry Registry::standard(std::span<const fs::path> extra, DeviceCheck check) {
  Registry registry(std::move(check));
  // Errors say where the folder was named.
  const auto named = [&](const char* where, const fs::path& folder) {
    try {
      registry.add_folder(folder);
    } catch (const Error& error) {
      throw Error("{}: {}", where, error.what());
    }
  };
  const fs::path own =
      boost::dll::program_location().parent_path() / ".." / "lib" / "sikv" / "plugins";
  if (fs::is_directory(own)) {
    for (const fs::path& file : libraries_in(own.lexically_normal())) registry.add_library(file);
  }
  if (const char* list = std::getenv("SIKV_PLUGIN_PATH")) {
    std::string_view rest = list;
    while (!rest.empty()) {
      const size_t colon = std::min(rest.find(':'), rest.size());
      if (colon > 0) named("SIKV_PLUGIN_PATH", rest.substr(0, colon));
      rest.remove_prefix(std::min(colon + 1, rest.size()));
    }
  }
  for (const fs::path& folder : extra) named("--plugin-path", folder);
  return registry;
}

std::vector<std::string> Registry::ids(sikv_kind kind) const {
  std::set<std::string> ids;
  for (const Variant& variant : variants_) {
    if (variant.kind == kind) ids.insert(variant.id);
  }
  return {ids.begin(), ids.end()};
}

std::vector<const Variant*> Registry::variants_of(sikv_kind kind, std::string_view id) const {
  std::vector<const Variant*> found;
  for (const Variant& variant : variants_) {
    if (variant.kind == kind && variant.id == id) found.push_back(&variant);
  }
  return found;
}

std::string Registry::refusals_of(sikv_kind kind, std::string_view id) const {
  std::string text;
  for (const RefusedLibrary& refused : refused_) {
    if (refused.id == id && (refused.kinds == 0 || (refused.kinds & SIKV_KIND_BIT(kind)) != 0)) {
      text += fmt::format("; '{}' was refused: {}", refused.path.string(), refused.reason);
    }
  }
  return text;
}

std::span<const sikv_option_spec> Registry::options(sikv_kind kind, std::string_view id) const {
  const std::vector<const Variant*> variants = variants_of(kind, id);
  if (!variants.empty()) return variants.front()->options;
  const std::string refusals = refusals_of(kind, id);
  if (!refusals.empty()) {
    throw Error("{} '{}' cannot be used{}", kind_name(kind), id, refusals);
  }
  const std::vector<std::string> known = ids(kind);
  if (known.empty()) {
    throw Error(
        "there is no {} '{}', nor any other: add the folder of the plugins to "
        "SIKV_PLUGIN_PATH",
        kind_name(kind), id);
  }
  const std::string near = did_you_mean(id, known);
  throw Error("there is no {} '{}'{}", kind_name(kind), id,
              near.empty()
                  ? "; there are " + join(known) + "; --plugin-path DIR adds those of a folder"
                  : near);
}

const Variant& Registry::find(sikv_kind kind, std::string_view id, std::string_view variant) const {
  static_cast<void>(options(kind, id));  // refuses an unknown id
  std::vector<std::string> names;
  for (const Variant* other : variants_of(kind, id)) {
    if (other->variant == variant) return *other;
    names.push_back(other->variant);
  }
  throw Error("{} '{}' has no variant '{}'; it has {}{}", kind_name(kind), id, variant, join(names),
              refusals_of(kind, id));
}

std::vector<Candidate> Registry::candidates(sikv_kind kind, std::string_view id,
                                            const sikv_device& device) const {
  std::vector<Candidate> found;
  for (const Variant* variant : variants_of(kind, id)) found.push_back(probe(*variant, device));
  std::stable_sort(found.begin(), found.end(),
                   [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
  return found;
}

const Variant& Registry::choose(sikv_kind kind, std::string_view id, const sikv_device& device,
                                std::string_view forced) const {
  if (!forced.empty()) {
    const Candidate candidate = probe(find(kind, id, forced), device);
    if (candidate.score > 0) return *candidate.variant;
    throw Error("{} is forced but cannot run: {}", candidate.variant->name(), candidate.reason);
  }
  static_cast<void>(options(kind, id));  // refuses an unknown id
  const std::vector<Candidate> found = candidates(kind, id, device);
  if (found.front().score > 0) return *found.front().variant;
  std::vector<std::string> reasons;
  for (const Candidate& candidate : found) {
    reasons.push_back(fmt::format("{}: {}", candidate.variant->variant, candidate.reason));
  }
  throw Error("no variant of {} '{}' can run here: {}{}", kind_name(kind), id, join(reasons, "; "),
              refusals_of(kind, id));
}

}  // namespace sikv
