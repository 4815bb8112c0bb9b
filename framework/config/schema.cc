#include "framework/config/schema.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "framework/config/config.h"
#include "framework/config/config_fields.h"
#include "framework/config/pipeline_parts.h"
#include "framework/registry/options.h"

namespace sikv {
namespace {

using nlohmann::json;

// Numbers appear in a document as integers where they are whole.
json number_json(double value) {
  const auto whole = static_cast<int64_t>(value);
  return static_cast<double>(whole) == value ? json(whole) : json(value);
}

// `text` as an editor's YAML reader types it.
json typed(const sikv_option_spec& option, const std::string& text) {
  if (option.type == SIKV_OPTION_BOOL) return text == "true";
  if (option.type == SIKV_OPTION_CHOICE || option.type == SIKV_OPTION_TEXT) return text;
  if (const std::optional<double> number = parse_number(text)) return number_json(*number);
  return text;
}

json range(const sikv_option_spec& option, const char* type) {
  return {
      {"type", type}, {"minimum", number_json(option.min)}, {"maximum", number_json(option.max)}};
}

// The values of one option, without its description.
json option_values(const sikv_option_spec& option) {
  if (option.choices != nullptr) {
    json choices = json::array();
    for (const std::string& choice : option_choices(option)) {
      choices.push_back(typed(option, choice));
      // An unquoted number, true or false is not a string to an editor, whatever it means here.
      const json unquoted = json::parse(choice, nullptr, /*allow_exceptions=*/false);
      if (unquoted.is_primitive() && !unquoted.is_discarded() && unquoted != choices.back()) {
        choices.push_back(unquoted);
      }
    }
    return {{"enum", choices}};
  }
  const json suffixed = {{"type", "string"}, {"pattern", "^[0-9]+[KM]$"}};
  switch (option.type) {
    case SIKV_OPTION_INT:
      return {{"anyOf", {range(option, "integer"), suffixed}}};
    case SIKV_OPTION_FLOAT:
      return range(option, "number");
    case SIKV_OPTION_BUDGET:
      return {{"anyOf",
               {{{"type", "integer"}, {"minimum", 0}},
                {{"type", "number"}, {"exclusiveMinimum", 0}, {"exclusiveMaximum", 1}},
                suffixed}}};
    case SIKV_OPTION_SELECTOR:
      return {{"$ref", "#/$defs/base"}};
    case SIKV_OPTION_TEXT:
      return {{"type", "string"}};
    default:
      return {{"type", "boolean"}};
  }
}

json option_schema(const sikv_option_spec& option) {
  json schema = option_values(option);
  schema["description"] = option.help;
  if (option.default_value != nullptr && option.type != SIKV_OPTION_SELECTOR) {
    schema["default"] = typed(option, option.default_value);
  }
  return schema;
}

json object(json properties, json required = json::array()) {
  return {{"type", "object"},
          {"properties", std::move(properties)},
          {"required", std::move(required)},
          {"additionalProperties", false}};
}

// One value, or a list of them.
json one_or_list(const sikv_option_spec& option) {
  const json value = option_values(option);
  return {{"description", option.help},
          {"anyOf", {value, {{"type", "array"}, {"items", value}, {"minItems", 1}}}}};
}

json text(const char* help) {
  return {{"type", "string"}, {"minLength", 1}, {"description", help}};
}

json model_schema() {
  json properties;
  properties["preset"] = {{"enum", model_presets()}, {"description", "a model known by name"}};
  json required = json::array();
  for (const sikv_option_spec& field : fields::kModel) {
    properties[field.name] = option_schema(field);
    if (field.default_value == nullptr) required.push_back(field.name);
  }
  json map = object(std::move(properties));
  map["anyOf"] = {{{"required", {"preset"}}}, {{"required", required}}};
  return {{"description", "shape of the model; without it, the trace's"},
          {"anyOf", {{{"enum", model_presets()}}, map}}};
}

json synthetic_schema() {
  json batch = one_or_list(fields::kBatch);
  batch["anyOf"].push_back({{"const", "max"}});
  json schema = object({{"kind", option_schema(fields::kSynthKind)},
                        {"context", one_or_list(fields::kContext)},
                        {"batch", batch},
                        {"dtype", option_schema(fields::kSynthDtype)},
                        {"seed", option_schema(fields::kSeed)}});
  schema["type"] = {"object", "null"};
  schema["description"] = "K, V and Q drawn at random, with the features of real ones";
  return schema;
}

json trace_schema() {
  return object({{"trace", text("an HDF5 trace of a real model")},
                 {"layers", one_or_list(fields::kLayer)},
                 {"prompt", option_schema(fields::kPrompt)},
                 {"steps", option_schema(fields::kSourceSteps)},
                 {"judge", one_or_list(fields::kJudge)},
                 {"make", text("the command that makes the trace, which may then be missing")}},
                {"trace"});
}

json source_schema() {
  return {{"description", "what the pipelines are fed; sikv eval alone needs none"},
          {"oneOf",
           {trace_schema(), object({{"synthetic", synthetic_schema()},
                                    {"steps", option_schema(fields::kSourceSteps)}},
                                   {"synthetic"})}}};
}

// One part of a pipeline: a branch per plugin, told apart by its id. A base lacks the options that
// the outermost selector takes for the framework.
json part_schema(const PipelinePart& part, const Registry& registry, bool is_base = false) {
  json branches = json::array();
  for (const std::string& id : registry.ids(part.kind)) {
    json properties = {{part.id_key, {{"const", id}}}};
    json required = {part.id_key};
    for (const sikv_option_spec& option : registry.options(part.kind, id)) {
      properties[option.name] = option_schema(option);
      if (option.type == SIKV_OPTION_SELECTOR) required.push_back(option.name);
    }
    if (part.kind == SIKV_SELECTOR && !is_base) {
      for (const sikv_option_spec& option : selector_common_options()) {
        properties[option.name] = option_schema(option);
      }
    }
    branches.push_back(object(std::move(properties), std::move(required)));
  }
  json schema = {{"type", "object"},
                 {"description", is_base ? "the selector that is wrapped" : part.help},
                 {"required", {part.id_key}},
                 {"properties", {{part.id_key, {{"enum", registry.ids(part.kind)}}}}}};
  // An empty oneOf is not a schema; the empty enum already refuses everything.
  if (!branches.empty()) schema["oneOf"] = std::move(branches);
  return schema;
}

constexpr const char* kLinePattern = "^[^+>]+\\+[^+>]+>[^>]+>[^>]+$";

// What an entry of `pipelines` has beside a pipeline.
json entry_properties() {
  return {{"label", text("short name in tables and figures")},
          {"source", text("one of sources, in place of source")},
          {"fitted", text("on what it was trained or calibrated")},
          {"reconstruction", text("what its paper leaves open")},
          {"budgets", one_or_list(fields::kBudget)}};
}

json pipeline_schema(const Registry& registry, bool entry) {
  json properties, force, required = json::array();
  for (const PipelinePart& part : kPipelineParts) {
    properties[part.family] = part_schema(part, registry);
    required.push_back(part.family);
    std::set<std::string> variants;
    for (const Variant& variant : registry.variants()) {
      if (variant.kind == part.kind) variants.insert(variant.variant);
    }
    force[part.family] = {{"enum", variants}};
  }
  const json name = {{"enum", kDeviceNames}};
  const json numbered = {{"type", "string"}, {"pattern", "^cuda:[0-9]+$"}};
  properties["device"] = {{"anyOf", json::array({name, numbered})},
                          {"default", "auto"},
                          {"description", "where it runs"}};
  properties["force"] = object(std::move(force));
  properties["force"]["description"] = "variant of a part that must run";
  const json line = {
      {"type", "string"},
      {"pattern", kLinePattern},
      {"description", "the one-line form: keys + values > selector(options) > kernel @device"}};
  if (!entry) return {{"anyOf", {line, object(std::move(properties), std::move(required))}}};
  json beside = entry_properties();
  properties.update(beside);
  beside["pipeline"] = line;
  return {{"anyOf",
           {line, object(std::move(properties), std::move(required)),
            object(std::move(beside), {"pipeline"})}}};
}

json measure_schema() {
  json schema = object({{"steps", option_schema(fields::kMeasureSteps)},
                        {"warmup", option_schema(fields::kWarmup)},
                        {"metrics", one_or_list(fields::kMetric)}});
  schema["description"] = "what to measure, and over how many steps";
  return schema;
}

}  // namespace

json config_schema(const Registry& registry) {
  const json pipeline = {{"$ref", "#/$defs/pipeline"}};
  json schema =
      object({{"model", model_schema()},
              {"source", source_schema()},
              {"sources",
               {{"type", "object"},
                {"additionalProperties", {{"$ref", "#/$defs/named_source"}}},
                {"description", "further traces, for pipelines that name one"}}},
              {"pipeline", pipeline},
              {"pipelines",
               {{"type", "array"},
                {"items", {{"$ref", "#/$defs/entry"}}},
                {"minItems", 1},
                {"description", "several pipelines, to be compared"}}},
              {"budgets", one_or_list(fields::kBudget)},
              {"group_by", option_schema(fields::kGroupBy)},
              {"measure", measure_schema()},
              {"threads", option_schema(fields::kThreads)},
              {"plugin_path",
               {{"description", "folders of plugin libraries, searched last"},
                {"anyOf", {text("a folder"), {{"type", "array"}, {"items", text("a folder")}}}}}}});
  schema["oneOf"] = {{{"required", {"pipeline"}}}, {{"required", {"pipelines"}}}};
  schema["$defs"] = {{"pipeline", pipeline_schema(registry, false)},
                     {"entry", pipeline_schema(registry, true)},
                     {"named_source", trace_schema()}};
  for (const PipelinePart& part : kPipelineParts) {
    if (part.kind == SIKV_SELECTOR) schema["$defs"]["base"] = part_schema(part, registry, true);
  }
  schema["$schema"] = "https://json-schema.org/draft/2020-12/schema";
  schema["title"] = "sikv config";
  return schema;
}

}  // namespace sikv
