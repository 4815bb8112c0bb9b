#include "framework/registry/judge.h"

#include <elf.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/registry/options.h"

namespace sikv {
namespace {

constexpr const char* kDescriptorSymbol = "sikv_plugin_descriptor";
constexpr const char* kTablesSymbol = "sikv_plugin_tables";

constexpr std::array kKinds = {SIKV_KEY_CODEC, SIKV_VALUE_CODEC, SIKV_SELECTOR, SIKV_KERNEL};
constexpr uint32_t kKnownKinds = SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC) |
                                 SIKV_KIND_BIT(SIKV_SELECTOR) | SIKV_KIND_BIT(SIKV_KERNEL);

// Sizes that ABI 1.0 froze: a plugin of any 1.x has at least these.
constexpr uint32_t kDescriptorSize = 200;
constexpr uint32_t kTablesSize = 16;
constexpr uint32_t kCodecSize = 72;
constexpr uint32_t kSelectorSize = 112;
constexpr uint32_t kKernelSize = 64;
static_assert(sizeof(sikv_plugin_descriptor_t) >= kDescriptorSize);

// Far above any real plugin; a count past it is a corrupt table.
constexpr uint64_t kMaxEntries = 64;
constexpr uint64_t kMaxOptions = 64;

// Keys that stand beside a plugin's options in a config, so that no option may have them.
constexpr std::array<std::string_view, 6> kReservedOptions = {"codec",  "kernel", "name",
                                                              "pinned", "pin",    "keep_generated"};

// The one name of an option of type SIKV_OPTION_SELECTOR.
constexpr std::string_view kBaseOption = "base";

std::string host_abi() { return fmt::format("ABI {}.{}", SIKV_ABI_MAJOR, SIKV_ABI_MINOR); }
std::string rebuild() { return "rebuild it against " + host_abi(); }

bool is_identifier(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
  });
}

// Untrusted text for a message: unprintable bytes become '?'.
std::string printable(std::string_view text) {
  std::string result(text);
  for (char& c : result) {
    if (c < ' ' || c > '~') c = '?';
  }
  return result;
}

// ---- ELF ----------------------------------------------------------------------------------------

constexpr unsigned char kElfData =
    std::endian::native == std::endian::little ? ELFDATA2LSB : ELFDATA2MSB;

class ElfFile {
 public:
  explicit ElfFile(std::span<const std::byte> bytes) : bytes_(bytes) {
    if (bytes.size() < SELFMAG || std::memcmp(bytes.data(), ELFMAG, SELFMAG) != 0) {
      throw Error(
          "it is not a shared library: the file does not start with the ELF signature; remove it "
          "from the plugin folder");
    }
    header_ = read<Elf64_Ehdr>(0);
    if (header_.e_ident[EI_CLASS] != ELFCLASS64 || header_.e_ident[EI_DATA] != kElfData ||
        header_.e_type != ET_DYN) {
      throw Error("it is not a 64-bit shared library of this host's byte order; build it here");
    }
    // A segment that the file does not hold whole would only be missed when it is touched.
    check_range(header_.e_shoff, uint64_t{header_.e_shnum} * sizeof(Elf64_Shdr));
    check_range(header_.e_phoff, uint64_t{header_.e_phnum} * sizeof(Elf64_Phdr));
    for (uint16_t i = 0; i < header_.e_phnum; ++i) {
      const auto segment = read_entry<Elf64_Phdr>(header_.e_phoff, i);
      if (segment.p_type == PT_LOAD) check_range(segment.p_offset, segment.p_filesz);
    }
  }

  struct Symbol {
    uint64_t address;
    uint64_t size;
  };
  // Address 0 if the library does not define and export `name`.
  Symbol find(std::string_view name) const {
    for (uint16_t i = 0; i < header_.e_shnum; ++i) {
      const auto section = read_entry<Elf64_Shdr>(header_.e_shoff, i);
      if (section.sh_type != SHT_DYNSYM) continue;
      const auto names = read_entry<Elf64_Shdr>(header_.e_shoff, section.sh_link);
      for (uint64_t s = 0; s < section.sh_size / sizeof(Elf64_Sym); ++s) {
        const auto symbol = read_entry<Elf64_Sym>(section.sh_offset, s);
        if (symbol.st_shndx == SHN_UNDEF || symbol.st_name >= names.sh_size) continue;
        if (text_is(names.sh_offset, symbol.st_name, name)) {
          return {symbol.st_value, symbol.st_size};
        }
      }
    }
    return {0, 0};
  }

  // What the file holds for the loaded range [address, address + size), cut where it ends.
  std::span<const std::byte> loaded(uint64_t address, uint64_t size) const {
    for (uint16_t i = 0; i < header_.e_phnum; ++i) {
      const auto segment = read_entry<Elf64_Phdr>(header_.e_phoff, i);
      if (segment.p_type != PT_LOAD || address < segment.p_vaddr ||
          address - segment.p_vaddr >= segment.p_filesz) {
        continue;
      }
      const uint64_t skip = address - segment.p_vaddr;
      return bytes_.subspan(segment.p_offset + skip, std::min(size, segment.p_filesz - skip));
    }
    return {};
  }

 private:
  void check_range(uint64_t offset, uint64_t size) const {
    if (offset <= bytes_.size() && size <= bytes_.size() - offset) return;
    throw Error(
        "it is truncated or damaged: its tables point past the {} bytes of the file; copy or build "
        "it again",
        bytes_.size());
  }

  template <typename T>
  T read(uint64_t offset) const {
    check_range(offset, sizeof(T));
    T value;
    std::memcpy(&value, bytes_.data() + offset, sizeof value);
    return value;
  }
  template <typename T>
  T read_entry(uint64_t table, uint64_t i) const {
    check_range(table, 0);
    check_range(0, i);  // keeps the next line from overflowing
    return read<T>(table + i * sizeof(T));
  }
  bool text_is(uint64_t table, uint64_t offset, std::string_view name) const {
    check_range(table, offset);
    const auto rest = bytes_.subspan(table + offset);
    return rest.size() > name.size() && rest[name.size()] == std::byte{0} &&
           std::memcmp(rest.data(), name.data(), name.size()) == 0;
  }

  std::span<const std::byte> bytes_;
  Elf64_Ehdr header_;
};

// ---- tables -------------------------------------------------------------------------------------

void judge_option(const sikv_option_spec& spec, sikv_kind kind, std::string_view owner) {
  const std::string name = spec.name == nullptr ? "" : printable(spec.name);
  if (!is_identifier(name)) {
    throw Error(
        "{} has an option named '{}', expected lower-case letters, digits and '_'; rename it",
        owner, name);
  }
  if (std::find(kReservedOptions.begin(), kReservedOptions.end(), name) != kReservedOptions.end()) {
    throw Error("{} has an option named '{}', which configs use for something else; rename it",
                owner, name);
  }
  const auto broken = [&](std::string_view what) {
    throw Error("{} has an option '{}' {}", owner, name, what);
  };
  if (spec.type < SIKV_OPTION_INT || spec.type > SIKV_OPTION_TEXT) {
    broken(fmt::format("of type {}, expected 1 to {}; {}", spec.type,
                       static_cast<int>(SIKV_OPTION_TEXT), rebuild()));
  }
  const bool wraps = spec.type == SIKV_OPTION_SELECTOR;
  if (wraps != (name == kBaseOption)) {
    broken(
        fmt::format("of type {}, but '{}' is what the option of type {} is named, and no other; "
                    "rename it",
                    spec.type, kBaseOption, static_cast<int>(SIKV_OPTION_SELECTOR)));
  }
  if (wraps && kind != SIKV_SELECTOR) broken("to wrap a selector, which only selectors do");
  const bool lists = spec.type == SIKV_OPTION_INT || spec.type == SIKV_OPTION_CHOICE;
  if (spec.type == SIKV_OPTION_CHOICE && spec.choices == nullptr) {
    broken("with nothing to choose from; list its choices");
  }
  if (spec.choices != nullptr && !lists) {
    broken("with choices, which go with types int and choice only; remove them");
  }
  for (const std::string& choice : option_choices(spec)) {
    // What would end a value in the one-line form of a pipeline.
    if (choice.empty() || choice.find_first_of(" \t\n,()") != std::string::npos) {
      broken(
          fmt::format("with the choice '{}'; give every choice a name without spaces, commas "
                      "and parentheses",
                      printable(choice)));
    }
  }
  if ((spec.type == SIKV_OPTION_FLOAT ||
       (spec.type == SIKV_OPTION_INT && spec.choices == nullptr)) &&
      !(spec.min <= spec.max)) {
    broken(fmt::format("with the empty range {} to {}; exchange its bounds", spec.min, spec.max));
  }
  if (spec.help == nullptr || spec.help[0] == '\0' || std::strchr(spec.help, '\n') != nullptr) {
    broken("without a help text of one line; add it");
  }
  if (spec.default_value == nullptr) broken("without a default; add it");
  if (wraps) {
    if (spec.default_value[0] != '\0') {
      broken(fmt::format("with the default '{}', but a wrapper has no default base; leave it empty",
                         printable(spec.default_value)));
    }
    return;
  }
  try {
    parse_option(spec, spec.default_value, owner);
  } catch (const Error& error) {
    broken(fmt::format("with the default '{}', expected {}; correct it",
                       printable(spec.default_value), allowed_text(spec)));
  }
}

void judge_options(const sikv_plugin_entry& entry, std::string_view owner) {
  const auto kind = static_cast<sikv_kind>(entry.kind);
  if (entry.num_options > kMaxOptions || (entry.num_options > 0 && entry.options == nullptr)) {
    throw Error("{} has {} options at {}, expected at most {}; {}", owner, entry.num_options,
                entry.options == nullptr ? "NULL" : "an address", kMaxOptions, rebuild());
  }
  std::set<std::string_view> names;
  for (uint64_t i = 0; i < entry.num_options; ++i) {
    judge_option(entry.options[i], kind, owner);
    if (!names.insert(entry.options[i].name).second) {
      throw Error("{} has two options named '{}'; rename one", owner, entry.options[i].name);
    }
  }
}

// The slots of a table without which it cannot be used, by name; NULL in those is a refusal.
struct Slot {
  const char* name;
  bool set;
};
std::vector<Slot> mandatory_slots(sikv_kind kind, const PluginTable& table) {
  const auto common = [](const auto& t) {
    return std::vector<Slot>{{"probe", t.probe != nullptr},
                             {"create", t.create != nullptr},
                             {"destroy", t.destroy != nullptr}};
  };
  std::vector<Slot> slots;
  const auto add = [&](const char* name, auto* function) {
    slots.push_back({name, function != nullptr});
  };
  switch (kind) {
    case SIKV_KEY_CODEC:
    case SIKV_VALUE_CODEC:
      slots = common(table.codec);
      add("describe", table.codec.describe);
      add("workspace_bytes", table.codec.workspace_bytes);
      add("fit", table.codec.fit);
      add("encode", table.codec.encode);
      add("decode", table.codec.decode);
      break;
    case SIKV_SELECTOR:
      slots = common(table.selector);
      add("accepts", table.selector.accepts);
      add("plan", table.selector.plan);
      add("begin_sequence", table.selector.begin_sequence);
      add("observe", table.selector.observe);
      add("observe_page", table.selector.observe_page);
      add("begin_step", table.selector.begin_step);
      add("run", table.selector.run);
      add("state_bytes", table.selector.state_bytes);
      break;
    case SIKV_KERNEL:
      slots = common(table.kernel);
      add("accepts", table.kernel.accepts);
      add("plan", table.kernel.plan);
      add("run", table.kernel.run);
      break;
  }
  return slots;
}

uint32_t frozen_size(sikv_kind kind) {
  return kind == SIKV_SELECTOR ? kSelectorSize : kind == SIKV_KERNEL ? kKernelSize : kCodecSize;
}

uint32_t table_size(const void* table) {
  uint32_t size;
  std::memcpy(&size, table, sizeof size);
  return size;
}

}  // namespace

std::string cpu_only(sikv_device_type device) {
  return device == SIKV_CPU ? "" : "this host has no CUDA device";
}

std::string_view kind_name(sikv_kind kind) {
  switch (kind) {
    case SIKV_KEY_CODEC:
      return "key codec";
    case SIKV_VALUE_CODEC:
      return "value codec";
    case SIKV_SELECTOR:
      return "selector";
    case SIKV_KERNEL:
      return "kernel";
  }
  return "unknown kind";
}

std::string kinds_text(uint32_t kinds) {
  std::vector<std::string> names;
  for (const sikv_kind kind : kKinds) {
    if (kinds & SIKV_KIND_BIT(kind)) names.emplace_back(kind_name(kind));
  }
  return join(names);
}

std::span<const std::byte> find_descriptor(std::span<const std::byte> file) {
  const ElfFile elf(file);
  const auto missing = [](const char* symbol) {
    throw Error("it does not export '{}'; register the plugin with SIKV_PLUGIN and {}", symbol,
                rebuild());
  };
  const ElfFile::Symbol descriptor = elf.find(kDescriptorSymbol);
  if (descriptor.address == 0) missing(kDescriptorSymbol);
  if (elf.find(kTablesSymbol).address == 0) missing(kTablesSymbol);
  return elf.loaded(descriptor.address,
                    std::min<uint64_t>(descriptor.size, sizeof(sikv_plugin_descriptor_t)));
}

sikv_plugin_descriptor_t read_descriptor(std::span<const std::byte> bytes) {
  const auto copy = [&](size_t size) {
    sikv_plugin_descriptor_t copied{};
    std::copy_n(bytes.begin(), size, std::as_writable_bytes(std::span(&copied, 1)).begin());
    return copied;
  };
  sikv_plugin_descriptor_t d = copy(std::min(bytes.size(), sizeof d));
  if (std::memcmp(d.magic, SIKV_PLUGIN_MAGIC, sizeof d.magic) != 0) {
    throw Error("its descriptor starts with '{}', expected '{}'; {}",
                printable({d.magic, strnlen(d.magic, sizeof d.magic)}), SIKV_PLUGIN_MAGIC,
                rebuild());
  }
  if (d.abi_major != SIKV_ABI_MAJOR) {
    throw Error("it was built against ABI {}.{}, this sikv speaks {}; {}", d.abi_major, d.abi_minor,
                host_abi(), rebuild());
  }
  const size_t size = std::min({size_t{d.struct_size}, bytes.size(), sizeof d});
  if (size < kDescriptorSize) {
    throw Error("its descriptor has {} bytes, {} needs {}; {}", size, host_abi(), kDescriptorSize,
                rebuild());
  }
  d = copy(size);
  const auto check_end = [](const auto& text) {
    if (strnlen(text, sizeof text) == sizeof text) {
      throw Error("its descriptor has a text of {} bytes without an end; {}", sizeof text,
                  rebuild());
    }
  };
  check_end(d.id);
  check_end(d.version);
  check_end(d.architectures);
  check_end(d.build_id);
  check_end(d.faster_paths);
  if (!is_identifier(d.id)) {
    throw Error("its id is '{}', expected lower-case letters, digits and '_'; rename it",
                printable(d.id));
  }
  return d;
}

void judge_descriptor(const sikv_plugin_descriptor_t& d, const DeviceCheck& check) {
  if (d.abi_minor > SIKV_ABI_MINOR) {
    throw Error("it was built against ABI {}.{}, this sikv speaks {}; {} or use a newer sikv",
                d.abi_major, d.abi_minor, host_abi(), rebuild());
  }
  if (d.kinds == 0 || (d.kinds & ~kKnownKinds) != 0) {
    throw Error("its descriptor names the kinds {:#x}, this sikv knows {:#x} ({}); {}", d.kinds,
                kKnownKinds, kinds_text(kKnownKinds), rebuild());
  }
  if (d.device != SIKV_CPU && d.device != SIKV_CUDA) {
    throw Error("its device is {}, this sikv knows 0 (cpu) and 1 (cuda); {}", d.device, rebuild());
  }
  const std::string absent = check(static_cast<sikv_device_type>(d.device));
  if (!absent.empty()) {
    throw Error("it runs on {} and {}; use the plugin's {} library here",
                d.device == SIKV_CUDA ? "CUDA" : "the CPU", absent,
                d.device == SIKV_CUDA ? "cpu" : "cuda");
  }
}

void judge_tables(const sikv_plugin_descriptor_t& descriptor, const sikv_plugin_tables_t* tables) {
  if (tables == nullptr) throw Error("sikv_plugin_tables() returned NULL; {}", rebuild());
  if (tables->struct_size < kTablesSize) {
    throw Error("its sikv_plugin_tables_t has {} bytes, {} needs {}; {}", tables->struct_size,
                host_abi(), kTablesSize, rebuild());
  }
  if (tables->num_entries == 0 || tables->num_entries > kMaxEntries || tables->entries == nullptr) {
    throw Error("it has {} entries at {}, expected 1 to {}; {}", tables->num_entries,
                tables->entries == nullptr ? "NULL" : "an address", kMaxEntries, rebuild());
  }
  uint32_t seen = 0;
  std::set<std::pair<uint32_t, std::string_view>> variants;
  for (uint32_t i = 0; i < tables->num_entries; ++i) {
    const sikv_plugin_entry& entry = tables->entries[i];
    if (entry.kind >= 32 || (SIKV_KIND_BIT(entry.kind) & descriptor.kinds) == 0) {
      const bool known = entry.kind < 32 && (SIKV_KIND_BIT(entry.kind) & kKnownKinds) != 0;
      throw Error("entry {} is of kind {}, its descriptor names only {}; add the kind there", i,
                  known ? std::string(kind_name(static_cast<sikv_kind>(entry.kind)))
                        : std::to_string(entry.kind),
                  kinds_text(descriptor.kinds));
    }
    const auto kind = static_cast<sikv_kind>(entry.kind);
    seen |= SIKV_KIND_BIT(entry.kind);
    const std::string variant = entry.variant == nullptr ? "" : printable(entry.variant);
    if (!is_identifier(variant)) {
      throw Error(
          "entry {} has the variant '{}', expected ref, cpu, cuda or another name of lower-case "
          "letters; rename it",
          i, variant);
    }
    const std::string owner =
        fmt::format("its {} '{}' ({})", kind_name(kind), descriptor.id, variant);
    if (!variants.insert({entry.kind, entry.variant}).second) {
      throw Error("{} is there twice; rename one", owner);
    }
    if (entry.table == nullptr)
      throw Error("{} has no table of functions; add it to the entry", owner);
    if (table_size(entry.table) < frozen_size(kind)) {
      throw Error("{} has a table of {} bytes, {} needs {}; {}", owner, table_size(entry.table),
                  host_abi(), frozen_size(kind), rebuild());
    }
    for (const Slot& slot : mandatory_slots(kind, full_table(entry))) {
      if (!slot.set) throw Error("{} leaves '{}' NULL; implement it", owner, slot.name);
    }
    judge_options(entry, owner);
  }
  if (seen != descriptor.kinds) {
    throw Error("its descriptor names {}, for which it has no entry; remove the kind there",
                kinds_text(descriptor.kinds & ~seen));
  }
}

PluginTable full_table(const sikv_plugin_entry& entry) {
  PluginTable table;
  std::memset(&table, 0, sizeof table);
  const auto kind = static_cast<sikv_kind>(entry.kind);
  const size_t host_size = kind == SIKV_SELECTOR ? sizeof table.selector
                           : kind == SIKV_KERNEL ? sizeof table.kernel
                                                 : sizeof table.codec;
  std::memcpy(&table, entry.table, std::min<size_t>(table_size(entry.table), host_size));
  return table;
}

}  // namespace sikv
