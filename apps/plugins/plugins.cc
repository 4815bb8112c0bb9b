#include "apps/plugins/plugins.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "apps/common/kinds.h"
#include "apps/common/show.h"
#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/cache/ledger.h"
#include "framework/config/pipeline_parts.h"
#include "framework/experiment/throughput.h"
#include "framework/registry/instance.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

// What layouts are shown for; nothing about a layout's name depends on it.
constexpr ModelSpec example_model() {
  ModelSpec model;
  model.query_heads = 4;
  model.head_dim = 128;
  return model;
}
constexpr int kExampleTokens = 4096;

struct PluginsFlags {
  PluginFlags plugins;
  std::string name;
  bool markdown = false;
};

void list(const Registry& registry) {
  Table table({{"kind", Table::Align::kLeft},
               {"id", Table::Align::kLeft},
               {"variants", Table::Align::kLeft},
               {"version", Table::Align::kLeft}},
              "library");
  for (const auto& [kind, name] : kKinds) {
    for (const std::string& id : registry.ids(kind)) {
      std::vector<std::string> variants, versions, paths;
      const auto add = [](std::vector<std::string>& to, const std::string& text) {
        if (std::find(to.begin(), to.end(), text) == to.end()) to.push_back(text);
      };
      for (const Variant& variant : registry.variants()) {
        if (variant.kind != kind || variant.id != id) continue;
        add(variants, variant.variant);
        add(versions, variant.version);
        add(paths, variant.path.string());
      }
      table.row({{name}, {id}, {join(variants)}, {join(versions)}}, join(paths));
    }
  }
  std::string text = table.text(TableStyle::of(stdout));
  if (registry.variants().empty()) {
    text = "No plugins were found: set SIKV_PLUGIN_PATH to the folders that hold them.\n";
  }
  if (!registry.refused().empty()) text += "\nRefused\n";
  for (const RefusedLibrary& refused : registry.refused()) {
    text += fmt::format("  {}: {}\n", refused.path.string(), refused.reason);
  }
  print(text);
}

// What `sikv plugins show` prints as default: a wrapper's base must be given.
std::string default_text(const sikv_option_spec& option) {
  if (option.type == SIKV_OPTION_SELECTOR) return "none: required";
  return option.default_value;
}

// "1 to 8", "a|b|c"; empty where any value of the type will do.
std::string range_text(const sikv_option_spec& option) {
  if (option.choices != nullptr) return option.choices;
  if (option.type == SIKV_OPTION_INT || option.type == SIKV_OPTION_FLOAT) {
    return fmt::format("{} to {}", option.min, option.max);
  }
  return option.type == SIKV_OPTION_BOOL ? "true|false" : "";
}

std::string_view type_text(const sikv_option_spec& option) {
  switch (option.type) {
    case SIKV_OPTION_INT:
      return "integer";
    case SIKV_OPTION_FLOAT:
      return "number";
    case SIKV_OPTION_BOOL:
      return "flag";
    case SIKV_OPTION_CHOICE:
      return "choice";
    case SIKV_OPTION_SELECTOR:
      return "selector";
    case SIKV_OPTION_TEXT:
      return "text";
    default:
      return "tokens or fraction";
  }
}

std::string options_table(std::span<const sikv_option_spec> options) {
  Table table({{"option", Table::Align::kLeft},
               {"type", Table::Align::kLeft},
               {"range", Table::Align::kLeft},
               {"default", Table::Align::kLeft}},
              "help");
  for (const sikv_option_spec& option : options) {
    table.row({{option.name},
               {std::string(type_text(option))},
               {range_text(option)},
               {default_text(option)}},
              option.help);
  }
  return table.text(TableStyle::of(stdout));
}

// The options of the plugins of one id as the table of its README: | option | default | ...
std::string options_markdown(const Registry& registry, const std::vector<sikv_kind>& kinds,
                             const std::string& id) {
  std::string text = "| option | default | values | what |\n|---|---|---|---|\n";
  for (const sikv_kind kind : kinds) {
    const std::string owner = kinds.size() > 1 ? fmt::format(" ({})", kind_name(kind)) : "";
    for (const sikv_option_spec& option : registry.options(kind, id)) {
      std::string values = option.type == SIKV_OPTION_BUDGET     ? "a count, or a fraction below 1"
                           : option.type == SIKV_OPTION_SELECTOR ? "a selector"
                           : option.type == SIKV_OPTION_TEXT     ? "text"
                                                                 : range_text(option);
      for (size_t at = 0; (at = values.find('|', at)) != std::string::npos;) {
        values.replace(at, 1, ", ");
      }
      text += fmt::format("| `{}`{} | {} | {} | {} |\n", option.name, owner, default_text(option),
                          values, option.help);
    }
  }
  return text;
}

// Instances with default options on a small example, to ask them about layouts.
class Examples {
 public:
  explicit Examples(const Registry& registry)
      : registry_(registry),
        device_(open_cpu_device(1)),
        shape_(model_shape(example_model(), SIKV_FP16, kExampleTokens, 1)) {}

  template <typename Instance>
  Instance make(sikv_kind kind, const std::string& id) const {
    const Variant& variant = registry_.choose(kind, id, device_->info());
    return Instance(variant, OptionSet::parse(variant.options, {}, id), shape_, device_->info(),
                    device_->host());
  }
  sikv_layout layout(sikv_kind kind, const std::string& id) const {
    return make<CodecInstance>(kind, id).describe();
  }

 private:
  const Registry& registry_;
  std::unique_ptr<Device> device_;
  sikv_shape shape_;
};

// One line per codec: "  rot_lm  rlm4(bits=3).v1  yes", or why not.
template <typename Refusal>
std::string acceptance_table(const Examples& examples, const Registry& registry, sikv_kind kind,
                             Refusal&& refusal) {
  Table table({{std::string(kind_name(kind)), Table::Align::kLeft},
               {"default layout", Table::Align::kLeft}},
              "read");
  for (const std::string& id : registry.ids(kind)) {
    const sikv_layout layout = examples.layout(kind, id);
    const std::string reason = refusal(layout);
    table.row({{id}, {layout_text(layout)}}, reason.empty() ? "yes" : "no: " + reason);
  }
  return table.text(TableStyle::of(stdout));
}

// What a selector needs of the source and does to the cache, a line each.
std::string needs_text(const Registry& registry, const std::string& id) {
  uint32_t flags = 0;
  bool evicts = false;
  for (const Variant& variant : registry.variants()) {
    if (variant.kind != SIKV_SELECTOR || variant.id != id) continue;
    flags |= variant.selector().flags;
    evicts |= variant.selector().evict != nullptr;
  }
  const bool wraps = wrapper_option(registry.options(SIKV_SELECTOR, id)) != nullptr;
  std::string text;
  if (wraps) text += "  wraps another selector: needs and layouts are also those of its base\n";
  if (flags & SIKV_SELECTOR_NEEDS_ALL_QUERIES)
    text += "  needs the queries of every prompt position\n";
  if (flags & SIKV_SELECTOR_NEEDS_ALL_LAYERS) text += "  needs every layer of the model\n";
  if (flags & SIKV_SELECTOR_NEEDS_W_O)
    text += "  needs w_o, the output projection of every layer\n";
  if (evicts) {
    text += fmt::format("  gives tokens back{}{}\n",
                        flags & SIKV_SELECTOR_EVICTS_TOGETHER ? ", of all layers together" : "",
                        wraps ? ", where its base does" : "");
  }
  return text;
}

std::string layouts_text(const Registry& registry, sikv_kind kind, const std::string& id) {
  // A wrapper reads what its base reads.
  if (wrapper_option(registry.options(kind, id)) != nullptr) return "";
  const Examples examples(registry);
  if (kind == SIKV_SELECTOR) {
    const auto selector = examples.make<SelectorInstance>(kind, id);
    return acceptance_table(examples, registry, SIKV_KEY_CODEC,
                            [&](const sikv_layout& layout) { return selector.refusal(layout); });
  }
  if (kind == SIKV_KERNEL) {
    const auto kernel = examples.make<KernelInstance>(kind, id);
    const std::vector<std::string> values = registry.ids(SIKV_VALUE_CODEC);
    if (values.empty()) return "";
    const sikv_layout value = examples.layout(SIKV_VALUE_CODEC, values.front());
    return fmt::format("  values in {}\n", layout_text(value)) +
           acceptance_table(examples, registry, SIKV_KEY_CODEC, [&](const sikv_layout& layout) {
             return kernel.refusal(layout, value);
           });
  }
  const sikv_layout layout = examples.layout(kind, id);
  Table table({{"plane", Table::Align::kLeft}, {"bytes/token"}});
  for (uint32_t i = 0; i < layout.num_planes; ++i) {
    table.row(
        {{std::string(role_name(layout.planes[i].role))},
         number_cell(static_cast<double>(plane_page_bytes(layout.planes[i])) / SIKV_PAGE_TOKENS)});
  }
  return fmt::format("  writes {} by default; at head_dim {}:\n{}", layout_text(layout),
                     layout.head_dim, table.text(TableStyle::of(stdout)));
}

std::string show_one(const Registry& registry, sikv_kind kind, const std::string& id) {
  std::string text = fmt::format("{} {}\n", kind_name(kind), id);
  for (const Variant& variant : registry.variants()) {
    if (variant.kind != kind || variant.id != id) continue;
    text += fmt::format("  {} {} {}from {}\n", variant.variant, variant.version,
                        variant.architectures.empty() ? "" : "for " + variant.architectures + ", ",
                        variant.path.string());
    if (!variant.faster_paths.empty()) {
      text += fmt::format("    chosen at run time: {}\n", variant.faster_paths);
    }
  }
  const auto own = registry.options(kind, id);
  std::vector<sikv_option_spec> options(own.begin(), own.end());
  if (kind == SIKV_SELECTOR) {
    const auto common = selector_common_options();
    options.insert(options.end(), common.begin(), common.end());
  }
  if (kind == SIKV_SELECTOR) text += needs_text(registry, id);
  text += "\n" + (options.empty() ? "  takes no options\n" : options_table(options));
  return text + "\n" + layouts_text(registry, kind, id);
}

// "quest" shows every plugin of that id, "selector/quest" that one.
void show(const Registry& registry, const PluginsFlags& flags) {
  const std::string& name = flags.name;
  const size_t slash = name.find('/');
  const std::string id = slash == std::string::npos ? name : name.substr(slash + 1);
  if (slash != std::string::npos) {
    const sikv_kind kind = parse_kind(name.substr(0, slash));
    static_cast<void>(registry.options(kind, id));  // refuses an unknown id
    print(flags.markdown ? options_markdown(registry, {kind}, id) : show_one(registry, kind, id));
    return;
  }
  std::string text;
  std::vector<std::string> all;
  std::vector<sikv_kind> kinds;
  for (const Kind& known : kKinds) {
    for (const std::string& other : registry.ids(known.kind)) {
      if (other == id) {
        kinds.push_back(known.kind);
        text += (text.empty() ? "" : "\n") + show_one(registry, known.kind, id);
      }
      if (std::find(all.begin(), all.end(), other) == all.end()) all.push_back(other);
    }
  }
  for (const RefusedLibrary& refused : registry.refused()) {
    if (refused.id == id) {
      text += fmt::format("{} was refused: {}\n", refused.path.string(), refused.reason);
    }
  }
  if (flags.markdown && !kinds.empty()) text = options_markdown(registry, kinds, id);
  if (text.empty()) {
    const std::string near = did_you_mean(id, all);
    throw Error("there is no plugin '{}'{}", id, near.empty() ? "; there are " + join(all) : near);
  }
  print(text);
}

}  // namespace

Command add_plugins(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("plugins", "What is installed, what was refused and why: list, show");
  auto flags = std::make_shared<PluginsFlags>();
  flags->plugins.add_to(*command);
  command->require_subcommand(0, 1);
  command->add_subcommand("list", "All plugins and refused libraries (the default)");
  CLI::App* show_command =
      command->add_subcommand("show", "Options, variants and layouts of a plugin");
  show_command->add_option("PLUGIN", flags->name, "an id such as quest, or KIND/ID")->required();
  show_command->add_flag("--markdown", flags->markdown,
                         "the options alone, as the table of the plugin's README");
  for (CLI::App* sub : command->get_subcommands({})) {
    sub->fallthrough();
    sub->footer(examples(
        {"sikv plugins " + sub->get_name() + (sub == show_command ? " selector/self_index" : "")}));
  }
  command->footer(examples({
      "sikv plugins",
      "sikv plugins show rot_lm",
      "sikv plugins show selector/self_index",
      "sikv plugins list --plugin-path my_selector/build/lib/sikv/plugins",
  }));
  return {command, [=] {
            const Registry registry = flags->plugins.open();
            if (show_command->parsed()) return show(registry, *flags);
            list(registry);
          }};
}

}  // namespace sikv
