// Judging a plugin library before anything in it runs.
//
// A library is first read as a file: its exports are looked up in the ELF symbol table and the
// descriptor, which holds no pointers, is copied from the bytes on disk. Only a library whose
// descriptor passes is opened, and only tables that pass are used. Every function here throws
// Error with one sentence about "it", the library, that ends with the remedy.
#ifndef SIKV_FRAMEWORK_REGISTRY_JUDGE_H_
#define SIKV_FRAMEWORK_REGISTRY_JUDGE_H_

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "plugins/abi/sikv_abi.h"
#include "plugins/abi/sikv_codec.h"
#include "plugins/abi/sikv_kernel.h"
#include "plugins/abi/sikv_selector.h"

namespace sikv {

// Empty if this host can run plugins of that device type, else why not.
using DeviceCheck = std::function<std::string(sikv_device_type)>;

// Serves the CPU alone.
std::string cpu_only(sikv_device_type device);

// "key codec", "value codec", "selector", "kernel".
std::string_view kind_name(sikv_kind kind);
// The kinds of a mask of SIKV_KIND_BITs, as "key codec, selector".
std::string kinds_text(uint32_t kinds);

// The bytes of the symbol `sikv_plugin_descriptor` in the shared library `file`, at most the
// descriptor's size as this host knows it. Also checks that `sikv_plugin_tables` is exported.
std::span<const std::byte> find_descriptor(std::span<const std::byte> file);

// The descriptor in `bytes`: magic, ABI major, size and id are right, every text ends. Fields past
// the plugin's struct_size are zero.
sikv_plugin_descriptor_t read_descriptor(std::span<const std::byte> bytes);

// The rest: ABI minor, kinds, and a device that this host can serve.
void judge_descriptor(const sikv_plugin_descriptor_t& descriptor, const DeviceCheck& check);

// Entries, their tables and their options, against the descriptor and against each other.
void judge_tables(const sikv_plugin_descriptor_t& descriptor, const sikv_plugin_tables_t* tables);

// A table at this host's full size: slots beyond the plugin's struct_size are NULL.
union PluginTable {
  sikv_codec_table codec;
  sikv_selector_table selector;
  sikv_kernel_table kernel;
};
PluginTable full_table(const sikv_plugin_entry& entry);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REGISTRY_JUDGE_H_
