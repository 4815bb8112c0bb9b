#include "framework/config/config.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <span>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/config/config_fields.h"
#include "framework/config/config_tree.h"
#include "framework/config/pipeline_parts.h"
#include "framework/config/pipeline_text.h"
#include "framework/registry/options.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

// bf16 bytes are parameters x 2, from the models' published parameter counts.
const std::array<ModelSpec, 4> kPresets = {{
    {"smollm2-135m", 30, 9, 3, 64, 100000, 269030016},
    {"llama-3.1-8b", 32, 32, 8, 128, 500000, 16060000000},
    {"qwen2.5-14b", 48, 40, 8, 128, 1000000, 29540000000},
    {"qwen3-8b", 36, 32, 8, 128, 1000000, 16380000000},
}};

// ---- one node at a time -------------------------------------------------------------------------

void check_keys(const ConfigNode& map, std::string_view owner, std::span<const char* const> keys) {
  if (!map.is_map()) {
    map.fail("{} is {}, expected a map with keys such as {}", owner, map.shown(), keys.front());
  }
  const std::vector<std::string> known(keys.begin(), keys.end());
  for (size_t i = 0; i < map.names.size(); ++i) {
    if (std::find(known.begin(), known.end(), map.names[i]) != known.end()) continue;
    const std::string near = did_you_mean(map.names[i], known);
    throw Error("{}: {} has no key '{}'{}", map.items[i].name_where, owner, map.names[i],
                near.empty() ? "; it takes " + join(known) : near);
  }
}

const ConfigNode& need(const ConfigNode& map, std::string_view owner, std::string_view key,
                       std::string_view example) {
  const ConfigNode* node = map.find(key);
  if (node == nullptr) map.fail("{} lacks '{}'; add {}", owner, key, example);
  return *node;
}

sikv_option_value read(const ConfigNode& node, const sikv_option_spec& field,
                       std::string_view owner) {
  if (!node.is_scalar()) {
    node.fail("{}: {} is {}, expected {}", owner, field.name, node.shown(), allowed_text(field));
  }
  return node.at([&] { return parse_option(field, node.text, owner); });
}

// The field where it is given; does nothing where it is not.
template <typename T>
void read_if(const ConfigNode& map, const sikv_option_spec& field, std::string_view owner,
             T& value) {
  const ConfigNode* node = map.find(field.name);
  if (node == nullptr) return;
  const sikv_option_value given = read(*node, field, owner);
  value = field.type == SIKV_OPTION_FLOAT ? static_cast<T>(given.f) : static_cast<T>(given.i);
}

// The texts of a list, or of one value on its own.
template <typename Visit>
void for_each_item(const ConfigNode& node, const sikv_option_spec& field, std::string_view owner,
                   Visit&& visit) {
  if (!node.is_list()) return visit(node, read(node, field, owner));
  if (node.items.empty()) {
    node.fail("{}: {} is an empty list, expected at least one value", owner, field.name);
  }
  for (const ConfigNode& item : node.items) visit(item, read(item, field, owner));
}

std::string read_text(const ConfigNode& node, std::string_view what) {
  if (!node.is_scalar() || node.text.empty()) {
    node.fail("{} is {}, expected a text", what, node.shown());
  }
  return node.text;
}

// ---- the parts of a config ----------------------------------------------------------------------

class Reader {
 public:
  Reader(const fs::path& folder, Registry& registry, SourceUse use)
      : folder_(folder), registry_(registry), source_use_(use) {}

  Config run(const ConfigNode& root) {
    check_keys(root, "config", fields::kTopKeys);
    Config config;
    // First, because everything below asks the registry.
    if (const ConfigNode* node = root.find("plugin_path")) plugin_path(*node, config);
    if (const ConfigNode* node = root.find("model")) config.model = model(*node);
    const bool source_read = source_use_ == SourceUse::kRead;
    if (source_read || root.find("source") != nullptr) {
      config.source = source(need(root, "config", "source", "a trace or synthetic:"));
    }
    if (source_read && config.source.synthetic && !config.model) {
      root.fail(
          "a synthetic source takes its shape from model, which config lacks; add a preset "
          "such as model: llama-3.1-8b");
    }
    if (const ConfigNode* node = root.find("sources")) sources(*node, config);
    pipelines(root, config);
    if (const ConfigNode* node = root.find("budgets")) config.budgets = budgets(*node, "config");
    if (const ConfigNode* node = root.find("group_by")) {
      const bool memory = read(*node, fields::kGroupBy, "config").text == std::string("memory");
      config.group_by = memory ? GroupBy::kMemory : GroupBy::kBudget;
    }
    if (const ConfigNode* node = root.find("measure")) config.measure = measure(*node);
    read_if(root, fields::kThreads, "config", config.threads);
    return config;
  }

 private:
  // Beside the config if it is there, else as seen from the working folder.
  fs::path resolved(const std::string& path) const {
    const fs::path beside = (folder_ / path).lexically_normal();
    std::error_code failed;
    return fs::exists(beside, failed) ? beside : fs::path(path);
  }

  // A text that names a file relative to the config gets the config's folder in front.
  std::string beside(const std::string& text) const {
    return text.empty() ? text : resolved(text).string();
  }

  void plugin_path(const ConfigNode& node, Config& config) {
    const auto add = [&](const ConfigNode& item) {
      const fs::path folder = resolved(read_text(item, "plugin_path"));
      item.at([&] { registry_.add_folder(folder); });
      config.plugin_path.push_back(folder);
    };
    if (!node.is_list()) return add(node);
    for (const ConfigNode& item : node.items) add(item);
  }

  static ModelSpec model(const ConfigNode& node) {
    if (node.is_scalar()) {
      return node.at([&] { return model_preset(node.text); });
    }
    check_keys(node, "model", fields::kModelKeys);
    ModelSpec model;
    const ConfigNode* preset = node.find("preset");
    if (preset != nullptr) {
      const std::string name = read_text(*preset, "preset");
      model = preset->at([&] { return model_preset(name); });
    }
    for (const sikv_option_spec& field : fields::kModel) {
      if (preset == nullptr && field.default_value == nullptr) {
        static_cast<void>(
            need(node, "model", field.name, "it or a preset such as preset: llama-3.1-8b"));
      }
    }
    read_if(node, fields::kModel[0], "model", model.layers);
    read_if(node, fields::kModel[1], "model", model.query_heads);
    read_if(node, fields::kModel[2], "model", model.kv_heads);
    read_if(node, fields::kModel[3], "model", model.head_dim);
    read_if(node, fields::kModel[4], "model", model.rope_theta);
    read_if(node, fields::kModel[5], "model", model.weight_bytes);
    if (model.query_heads % model.kv_heads != 0) {
      node.fail("model: query_heads is {}, expected a multiple of kv_heads, which is {}",
                model.query_heads, model.kv_heads);
    }
    return model;
  }

  static std::vector<std::string> budgets(const ConfigNode& node, std::string_view owner) {
    std::vector<std::string> budgets;
    for_each_item(
        node, fields::kBudget, owner,
        [&](const ConfigNode& item, const sikv_option_value&) { budgets.push_back(item.text); });
    return budgets;
  }

  void sources(const ConfigNode& node, Config& config) const {
    if (!node.is_map()) {
      node.fail("sources is {}, expected a map such as {{full: {{trace: FILE}}}}", node.shown());
    }
    for (size_t i = 0; i < node.names.size(); ++i) {
      config.sources[node.names[i]] = named_source(node.items[i], node.names[i]);
    }
  }

  SourceSpec named_source(const ConfigNode& node, const std::string& name) const {
    const std::string owner = fmt::format("source '{}'", name);
    check_keys(node, owner, fields::kNamedSourceKeys);
    return trace_source(node, owner);
  }

  SourceSpec trace_source(const ConfigNode& node, std::string_view owner) const {
    SourceSpec source;
    if (const ConfigNode* make = node.find("make"))
      source.make = read_text(*make, fmt::format("{}: make", owner));
    trace(need(node, owner, "trace", "trace: FILE"), source);
    lengths(node, source);
    if (const ConfigNode* judge = node.find("judge")) {
      source.judge = layers(*judge, fields::kJudge);
      for (int layer : source.judge) {
        if (source.layers.empty() ||
            std::find(source.layers.begin(), source.layers.end(), layer) != source.layers.end()) {
          continue;
        }
        judge->fail("{}: judge has layer {}, which layers lacks; add it there", owner, layer);
      }
    }
    return source;
  }

  void trace(const ConfigNode& node, SourceSpec& source) const {
    const std::string path = read_text(node, "source: trace");
    source.trace = resolved(path);
    std::error_code failed;
    if (fs::is_regular_file(source.trace, failed)) return;
    source.missing = !source.make.empty() || source_use_ == SourceUse::kIgnored;
    if (source.missing) {
      source.trace = (folder_ / path).lexically_normal();
      return;
    }
    const std::string beside = folder_.empty() ? "" : fmt::format("'{}' or ", folder_.string());
    node.fail("source: trace is '{}', and there is no such file{}; correct the path", path,
              fs::path(path).is_absolute() ? "" : fmt::format(" in {}the working folder", beside));
  }

  static std::vector<int> layers(const ConfigNode& node, const sikv_option_spec& field) {
    std::vector<int> layers;
    for_each_item(node, field, "source",
                  [&](const ConfigNode& item, const sikv_option_value& value) {
                    const int layer = static_cast<int>(value.i);
                    if (std::find(layers.begin(), layers.end(), layer) != layers.end()) {
                      item.fail("source: layer {} is given twice; remove one", layer);
                    }
                    layers.push_back(layer);
                  });
    return layers;
  }

  static void lengths(const ConfigNode& node, SourceSpec& source) {
    if (const ConfigNode* given = node.find("layers")) {
      source.layers = layers(*given, fields::kLayer);
    }
    read_if(node, fields::kPrompt, "source", source.prompt);
    read_if(node, fields::kSourceSteps, "source", source.steps);
  }

  SourceSpec source(const ConfigNode& node) const {
    check_keys(node, "source", fields::kSourceKeys);
    SourceSpec source;
    const ConfigNode* trace = node.find("trace");
    const ConfigNode* synthetic = node.find("synthetic");
    if ((trace == nullptr) == (synthetic == nullptr)) {
      node.fail("source has {} trace {} synthetic, expected one of them",
                trace == nullptr ? "neither" : "both", trace == nullptr ? "nor" : "and");
    }
    if (trace != nullptr) return trace_source(node, "source");
    for (const char* key : {"layers", "prompt", "judge", "make"}) {
      if (const ConfigNode* extra = node.find(key)) {
        throw Error("{}: source: {} goes with a trace only; remove it", extra->name_where, key);
      }
    }
    source.synthetic = SyntheticSpec();
    // `synthetic:` alone asks for all defaults.
    if (synthetic->type != ConfigNode::Type::kEmpty) {
      source.synthetic = this->synthetic(*synthetic);
    }
    lengths(node, source);
    return source;
  }

  static SyntheticSpec synthetic(const ConfigNode& node) {
    check_keys(node, "synthetic", fields::kSyntheticKeys);
    SyntheticSpec spec;
    if (const ConfigNode* kind = node.find("kind")) {
      spec.kind = read(*kind, fields::kSynthKind, "synthetic").text;
    }
    if (const ConfigNode* dtype = node.find("dtype")) {
      spec.dtype = read(*dtype, fields::kSynthDtype, "synthetic").text;
    }
    read_if(node, fields::kSeed, "synthetic", spec.seed);
    if (const ConfigNode* context = node.find("context")) {
      spec.context.clear();
      for_each_item(*context, fields::kContext, "synthetic",
                    [&](const ConfigNode&, const sikv_option_value& value) {
                      spec.context.push_back(value.i);
                    });
    }
    const ConfigNode* batch = node.find("batch");
    spec.batch_max = batch != nullptr && batch->is_scalar() && batch->text == "max";
    if (batch != nullptr && !spec.batch_max) {
      spec.batch.clear();
      for_each_item(*batch, fields::kBatch, "synthetic",
                    [&](const ConfigNode&, const sikv_option_value& value) {
                      spec.batch.push_back(static_cast<int>(value.i));
                    });
    }
    return spec;
  }

  void pipelines(const ConfigNode& root, Config& config) const {
    const ConfigNode* one = root.find("pipeline");
    const ConfigNode* several = root.find("pipelines");
    if (one != nullptr && several != nullptr) refuse_both(*one, *several);
    if ((one == nullptr) == (several == nullptr)) {
      root.fail("config has {} pipeline {} pipelines, expected one of them",
                one == nullptr ? "neither" : "both", one == nullptr ? "nor" : "and");
    }
    if (one != nullptr) {
      config.pipelines.push_back(pipeline(*one));
      return;
    }
    if (!several->is_list() || several->items.empty()) {
      several->fail("pipelines is {}, expected a list of pipelines",
                    several->is_list() ? "empty" : several->shown());
    }
    for (const ConfigNode& item : several->items) config.pipelines.push_back(entry(item, config));
  }

  // Where one of both came from the command line, what to write there.
  static void refuse_both(const ConfigNode& one, const ConfigNode& several) {
    const auto set = [](const ConfigNode& node) { return node.name_where.starts_with("--set "); };
    if (set(one) && several.is_list() && !several.items.empty()) {
      throw Error(
          "{}: the config has a list of pipelines: name one of them, as in pipelines.0{}, up to "
          "pipelines.{}, or set budgets for all",
          one.name_where, one.is_map() && !one.names.empty() ? "." + one.names[0] : "",
          several.items.size() - 1);
    }
    if (set(several)) {
      throw Error("{}: the config has one pipeline: set pipeline in place of pipelines.0",
                  several.name_where);
    }
  }

  // As check_keys, and the keys are told in any case: a pipeline is written in one of two ways.
  static void check_entry_keys(const ConfigNode& node) {
    std::vector<std::string> known(fields::kEntryKeys.begin(), fields::kEntryKeys.end());
    known.insert(known.end(), fields::kPipelineKeys.begin(), fields::kPipelineKeys.end());
    for (size_t i = 0; i < node.names.size(); ++i) {
      if (std::find(known.begin(), known.end(), node.names[i]) != known.end()) continue;
      throw Error("{}: an entry of pipelines has no key '{}'{} (it takes {})",
                  node.items[i].name_where, node.names[i], did_you_mean(node.names[i], known),
                  join(known));
    }
  }

  // One of `pipelines`: a pipeline, and what else is said of it.
  PipelineSpec entry(const ConfigNode& node, const Config& config) const {
    if (!node.is_map()) return pipeline(node);
    check_entry_keys(node);
    ConfigNode parts = node;
    parts.names.clear();
    parts.items.clear();
    const auto is_entry_key = [](const std::string& name) {
      const auto& keys = fields::kEntryKeys;
      return std::find(keys.begin(), keys.end(), name) != keys.end();
    };
    for (size_t i = 0; i < node.names.size(); ++i) {
      if (is_entry_key(node.names[i])) continue;
      parts.names.push_back(node.names[i]);
      parts.items.push_back(node.items[i]);
    }
    const ConfigNode* line = node.find("pipeline");
    if (line != nullptr && !parts.names.empty()) {
      throw Error(
          "{}: '{}' stands beside pipeline, which holds the whole one-line form; remove one",
          parts.items[0].name_where, parts.names[0]);
    }
    if (line != nullptr && !line->is_scalar()) {
      line->fail(
          "pipeline is {}, expected the one-line form: keys + values > selector > kernel; as "
          "parts, put keys, values, selector and attention into the entry itself",
          line->shown());
    }
    PipelineSpec spec = pipeline(line != nullptr ? *line : parts);
    const auto text = [&](const char* key) {
      const ConfigNode* given = node.find(key);
      return given == nullptr ? std::string() : read_text(*given, key);
    };
    spec.entry.label = text("label");
    spec.entry.fitted = text("fitted");
    spec.entry.reconstruction = text("reconstruction");
    spec.entry.source = text("source");
    if (!spec.entry.source.empty() && !config.sources.contains(spec.entry.source)) {
      std::vector<std::string> names;
      for (const auto& [name, source] : config.sources) names.push_back(name);
      const std::string near = did_you_mean(spec.entry.source, names);
      node.find("source")->fail("there is no source '{}'{}", spec.entry.source,
                                !near.empty()   ? near
                                : names.empty() ? "; add it under sources"
                                                : "; sources has " + join(names));
    }
    if (const ConfigNode* own = node.find("budgets")) {
      spec.entry.budgets = budgets(*own, "pipeline");
    }
    return spec;
  }

  PipelineSpec pipeline(const ConfigNode& node) const {
    if (node.is_scalar()) {
      PipelineSpec spec = node.at([&] { return parse_pipeline(node.text, registry_); });
      for (const PipelinePart& part : kPipelineParts) place(spec.*part.plugin, node.where);
      return spec;
    }
    check_keys(node, "pipeline", fields::kPipelineKeys);
    PipelineSpec spec;
    for (const PipelinePart& part : kPipelineParts) {
      this->part(need(node, "pipeline", part.family,
                      fmt::format("{}: {{{}: ...}}", part.family, part.id_key)),
                 part, spec);
    }
    if (const ConfigNode* device = node.find("device")) {
      spec.device = read_text(*device, "device");
      device->at([&] { check_device_name(spec.device); });
    }
    if (const ConfigNode* force = node.find("force")) forced(*force, spec);
    return spec;
  }

  static void place(PluginSpec& plugin, const std::string& where) {
    plugin.where = where;
    for (PluginSpec& base : plugin.base) place(base, where);
  }

  void part(const ConfigNode& node, const PipelinePart& part, PipelineSpec& spec) const {
    plugin(node, part.family, part, spec, spec.*part.plugin);
    node.at([&] { check_part(spec, part, registry_); });
  }

  // Ids of what a plugin wraps, from outside in, as far as they are written.
  static std::vector<std::string> bases_of(const ConfigNode& node, const PipelinePart& part) {
    std::vector<std::string> ids;
    for (const ConfigNode* base = node.find("base"); base != nullptr; base = base->find("base")) {
      const ConfigNode* id = base->find(part.id_key);
      if (id == nullptr || !id->is_scalar()) break;
      ids.push_back(id->text);
    }
    return ids;
  }

  // `key` is the part's family, or `base`.
  void plugin(const ConfigNode& node, std::string_view key, const PipelinePart& part,
              PipelineSpec& spec, PluginSpec& plugin) const {
    if (!node.is_map()) {
      node.fail("{} is {}, expected a map such as {{{}: ...}}", key, node.shown(), part.id_key);
    }
    const ConfigNode& id =
        need(node, key, part.id_key, fmt::format("the id of a {}", kind_name(part.kind)));
    plugin.id = read_text(id, part.id_key);
    plugin.where = node.where;
    const auto options = id.at([&] { return registry_.options(part.kind, plugin.id); });
    std::vector<sikv_option_spec> all(options.begin(), options.end());
    const bool outermost = &plugin == &(spec.*part.plugin);
    if (part.kind == SIKV_SELECTOR && outermost) {
      const auto common = selector_common_options();
      all.insert(all.end(), common.begin(), common.end());
    }
    const std::string owner = fmt::format("{} '{}'", kind_name(part.kind), plugin.id);
    const std::vector<std::string> bases =
        wrapper_option(options) != nullptr ? bases_of(node, part) : std::vector<std::string>();
    for (size_t i = 0; i < node.names.size(); ++i) {
      const std::string& name = node.names[i];
      const ConfigNode& value = node.items[i];
      if (name == part.id_key) continue;
      // Checked one by one, so that an error points at its own line.
      ConfigNode at_name;
      at_name.where = value.name_where;
      if (!outermost) at_name.at([&] { refuse_common_option_of_base(name); });
      const sikv_option_spec& option = at_name.at([&]() -> const sikv_option_spec& {
        return find_own_option(all, name, owner, bases, registry_);
      });
      if (option.type == SIKV_OPTION_SELECTOR) {
        plugin.base.emplace_back();
        this->plugin(value, name, part, spec, plugin.base.back());
        continue;
      }
      static_cast<void>(read(value, option, owner));
      if (part.kind == SIKV_SELECTOR && is_selector_common_option(name)) {
        set_selector_common_option(spec, name, value.text);
      } else {
        plugin.options.emplace_back(
            name, option.type == SIKV_OPTION_TEXT ? beside(value.text) : value.text);
      }
    }
    if (wrapper_option(options) != nullptr && plugin.base.empty()) {
      node.at([&] { static_cast<void>(OptionSet::parse(options, plugin.options, owner)); });
    }
  }

  void forced(const ConfigNode& node, PipelineSpec& spec) const {
    std::vector<const char*> families;
    for (const PipelinePart& part : kPipelineParts) families.push_back(part.family);
    check_keys(node, "force", families);
    for (const PipelinePart& part : kPipelineParts) {
      const ConfigNode* variant = node.find(part.family);
      if (variant == nullptr) continue;
      const std::string name = read_text(*variant, part.family);
      variant->at([&] { force_variant(spec, part, (spec.*part.plugin).id, name, registry_); });
    }
  }

  static MeasureSpec measure(const ConfigNode& node) {
    check_keys(node, "measure", fields::kMeasureKeys);
    MeasureSpec measure;
    read_if(node, fields::kMeasureSteps, "measure", measure.steps);
    read_if(node, fields::kWarmup, "measure", measure.warmup);
    if (const ConfigNode* metrics = node.find("metrics")) {
      measure.metrics.clear();
      for_each_item(*metrics, fields::kMetric, "measure",
                    [&](const ConfigNode& item, const sikv_option_value&) {
                      if (std::find(measure.metrics.begin(), measure.metrics.end(), item.text) ==
                          measure.metrics.end()) {
                        measure.metrics.push_back(item.text);
                      }
                    });
    }
    return measure;
  }

  fs::path folder_;
  Registry& registry_;
  SourceUse source_use_;
};

}  // namespace

Config parse_config(const std::string& text, const std::string& name,
                    const std::vector<std::string>& sets, Registry& registry, SourceUse source) {
  ConfigNode root = read_config_tree(text, name);
  for (const std::string& set : sets) override_config(root, set);
  Config config = Reader(fs::path(name).parent_path(), registry, source).run(root);
  config.file = name;
  return config;
}

Config load_config(const fs::path& file, const std::vector<std::string>& sets, Registry& registry,
                   SourceUse source) {
  std::error_code failed;
  if (fs::is_directory(file, failed)) {
    throw Error("the config '{}' is a folder; name a file in it", file.string());
  }
  std::ifstream stream(file, std::ios::binary);
  if (!stream) {
    throw Error("the config '{}' cannot be read: {}; correct the path", file.string(),
                std::strerror(errno));
  }
  const std::string text{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  return parse_config(text, file.string(), sets, registry, source);
}

namespace {

const std::vector<std::string>& budgets_of(const Config& config, const PipelineSpec& pipeline) {
  return pipeline.entry.budgets.empty() ? config.budgets : pipeline.entry.budgets;
}

}  // namespace

std::vector<PipelineSpec> expand_budgets(const Config& config, const Registry& registry) {
  std::vector<PipelineSpec> specs;
  for (const PipelineSpec& pipeline : config.pipelines) {
    const auto& budgets = budgets_of(config, pipeline);
    if (budgets.empty() || budget_holder(pipeline.selector, registry) == nullptr) {
      specs.push_back(pipeline);
      continue;
    }
    for (const std::string& budget : budgets) {
      PipelineSpec spec = pipeline;
      PluginSpec& holder = *budget_holder(spec.selector, registry);
      std::erase_if(holder.options, [](const auto& option) { return option.first == "budget"; });
      holder.options.emplace_back("budget", budget);
      for (const PipelinePart& part : kPipelineParts) {
        if (part.kind == SIKV_SELECTOR) check_part(spec, part, registry);
      }
      specs.push_back(std::move(spec));
    }
  }
  return specs;
}

std::vector<std::string> overridden_budgets(const Config& config, const Registry& registry) {
  std::vector<std::string> overridden;
  for (const PipelineSpec& pipeline : config.pipelines) {
    const PluginSpec* const holder = budget_holder(pipeline.selector, registry);
    if (holder == nullptr || budgets_of(config, pipeline).empty()) continue;
    for (const auto& [name, value] : holder->options) {
      if (name == "budget") overridden.push_back(fmt::format("budget={} of {}", value, holder->id));
    }
  }
  return overridden;
}

std::vector<std::string> without_budget(const Config& config, const Registry& registry) {
  std::vector<std::string> without, selecting_all;
  bool any = false;
  for (const PipelineSpec& pipeline : config.pipelines) {
    if (budgets_of(config, pipeline).empty()) continue;
    const std::string& id = pipeline.selector.id;
    if (budget_holder(pipeline.selector, registry) != nullptr) {
      any = true;
      continue;
    }
    const bool all = std::any_of(
        registry.variants().begin(), registry.variants().end(), [&](const Variant& variant) {
          return variant.kind == SIKV_SELECTOR && variant.id == id &&
                 (variant.selector().flags & SIKV_SELECTOR_SELECTS_ALL) != 0;
        });
    auto& ids = all ? selecting_all : without;
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  if (!any) without.insert(without.end(), selecting_all.begin(), selecting_all.end());
  return without;
}

const SourceSpec& source_of(const Config& config, const PipelineSpec& pipeline) {
  return pipeline.entry.source.empty() ? config.source : config.sources.at(pipeline.entry.source);
}

Config on_source_of(const Config& config, const PipelineSpec& pipeline) {
  Config own = config;
  own.source = source_of(config, pipeline);
  if (own.source.missing) {
    throw Error("the trace '{}' is not there: {} makes it", own.source.trace.string(),
                own.source.make);
  }
  return own;
}

ModelSpec model_preset(std::string_view name) {
  for (const ModelSpec& preset : kPresets) {
    if (preset.preset == name) return preset;
  }
  const std::vector<std::string> names = model_presets();
  const std::string near = did_you_mean(name, names);
  throw Error("there is no model preset '{}'{}", name,
              near.empty() ? "; there are " + join(names) : near);
}

std::vector<std::string> model_presets() {
  std::vector<std::string> names;
  for (const ModelSpec& preset : kPresets) names.push_back(preset.preset);
  return names;
}

}  // namespace sikv
