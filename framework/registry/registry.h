// Plugin libraries on disk -> variants by (kind, id, variant).
//
// A library is judged before anything in it is called: it must be a shared library with the two
// exported symbols, magic, ABI version, known kinds and a device this host can serve. What does
// not pass is kept with the sentence that says why; `sikv plugins` shows it and `choose` repeats
// it when a config names that plugin. Libraries are never unloaded.
#ifndef SIKV_FRAMEWORK_REGISTRY_REGISTRY_H_
#define SIKV_FRAMEWORK_REGISTRY_REGISTRY_H_

#include <deque>
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "framework/registry/judge.h"
#include "plugins/abi/sikv_codec.h"
#include "plugins/abi/sikv_kernel.h"
#include "plugins/abi/sikv_selector.h"

namespace sikv {

struct Variant {
  sikv_kind kind;
  std::string id;
  std::string variant;  // ref, cpu, cuda ...
  std::string version;
  sikv_device_type device;
  std::string architectures;
  std::string faster_paths;  // chosen at run time
  std::filesystem::path path;
  std::span<const sikv_option_spec> options;
  const void* table;  // sikv_codec_table, sikv_selector_table or sikv_kernel_table by kind

  const sikv_codec_table& codec() const { return *static_cast<const sikv_codec_table*>(table); }
  const sikv_selector_table& selector() const {
    return *static_cast<const sikv_selector_table*>(table);
  }
  const sikv_kernel_table& kernel() const { return *static_cast<const sikv_kernel_table*>(table); }

  // For messages: "selector 'quest' (ref)".
  std::string name() const;
};

struct RefusedLibrary {
  std::filesystem::path path;
  std::string id;      // empty if not even that could be read; then taken from the file name
  std::string reason;  // one sentence about "it", the library
  uint32_t kinds = 0;  // SIKV_KIND_BITs, from the descriptor or the file name; 0 = unknown
};

// How one variant answered a device.
struct Candidate {
  const Variant* variant;
  int score;           // > 0: can run
  std::string reason;  // why not, when score <= 0
};

class Registry {
 public:
  // `check` says which devices this host serves; libraries for others are refused.
  explicit Registry(DeviceCheck check = cpu_only);
  Registry(const Registry&) = delete;
  Registry& operator=(const Registry&) = delete;
  Registry(Registry&&) = default;
  Registry& operator=(Registry&&) = default;

  // Loads every lib*.so of a folder, in name order. Error if the folder is missing or has none.
  void add_folder(const std::filesystem::path& folder);
  // A file that was added before, under whatever name, is left alone.
  void add_library(const std::filesystem::path& path);
  // A plugin linked into the program: judged and added like one from `path`.
  void add_linked(const std::filesystem::path& path, const sikv_plugin_descriptor_t& descriptor,
                  const sikv_plugin_tables_t* tables);

  // The install's (or build tree's) plugin folder, found from the running executable, then each
  // folder of SIKV_PLUGIN_PATH, then `extra`, which --plugin-path gives.
  static Registry standard(std::span<const std::filesystem::path> extra = {},
                           DeviceCheck check = cpu_only);

  const std::deque<Variant>& variants() const { return variants_; }
  const std::vector<RefusedLibrary>& refused() const { return refused_; }

  // Sorted, unique.
  std::vector<std::string> ids(sikv_kind kind) const;
  // The option list of a (kind, id). Error naming the nearest id if there is none, with the
  // refusal's sentence if a library of that id was refused.
  std::span<const sikv_option_spec> options(sikv_kind kind, std::string_view id) const;
  // One variant; Error as for options, or naming the variants there are.
  const Variant& find(sikv_kind kind, std::string_view id, std::string_view variant) const;

  // Every variant of (kind, id) with its probe answer, best first.
  std::vector<Candidate> candidates(sikv_kind kind, std::string_view id,
                                    const sikv_device& device) const;
  // The best variant that runs on `device`; or the one named by `forced`, which must run.
  const Variant& choose(sikv_kind kind, std::string_view id, const sikv_device& device,
                        std::string_view forced = {}) const;

 private:
  // Throws Error with the sentence if the tables do not pass or clash with what is there.
  void register_entries(const std::filesystem::path& path,
                        const sikv_plugin_descriptor_t& descriptor,
                        const sikv_plugin_tables_t* tables);
  std::vector<const Variant*> variants_of(sikv_kind kind, std::string_view id) const;
  // "; /path/lib.so was refused: it ..." for each refused library of that plugin.
  std::string refusals_of(sikv_kind kind, std::string_view id) const;

  DeviceCheck check_;
  std::deque<Variant> variants_;    // addresses stay valid
  std::deque<PluginTable> tables_;  // what Variant::table points to
  std::vector<RefusedLibrary> refused_;
  std::set<std::filesystem::path> seen_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REGISTRY_REGISTRY_H_
