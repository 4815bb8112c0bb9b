#include "framework/config/schema.h"

#include <gtest/gtest.h>
#include <regex.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "framework/base/error.h"
#include "framework/config/config.h"
#include "framework/config/config_fields.h"
#include "framework/config/test_registry.h"

namespace sikv {
namespace {

using nlohmann::json;

// YAML as an editor types it.
json to_json(const YAML::Node& node) {
  if (node.IsMap()) {
    json map = json::object();
    for (const auto& entry : node) map[entry.first.Scalar()] = to_json(entry.second);
    return map;
  }
  if (node.IsSequence()) {
    json list = json::array();
    for (const YAML::Node& item : node) list.push_back(to_json(item));
    return list;
  }
  if (!node.IsScalar()) return nullptr;
  const json value = json::parse(node.Scalar(), nullptr, /*allow_exceptions=*/false);
  return value.is_discarded() ? json(node.Scalar()) : value;
}

bool has_type(const json& value, const std::string& type) {
  if (type == "integer") return value.is_number_integer();
  if (type == "number") return value.is_number();
  return value.type_name() == type;
}

bool matches(const std::string& pattern, const std::string& text) {
  regex_t compiled;
  EXPECT_EQ(regcomp(&compiled, pattern.c_str(), REG_EXTENDED | REG_NOSUB), 0);
  const bool found = regexec(&compiled, text.c_str(), 0, nullptr, 0) == 0;
  regfree(&compiled);
  return found;
}

// The keywords that config_schema uses; an unknown one fails the test.
bool valid(const json& root, const json& schema, const json& value) {
  const auto count = [&](const json& branches) {
    return std::count_if(branches.begin(), branches.end(),
                         [&](const json& branch) { return valid(root, branch, value); });
  };
  bool ok = true;
  for (const auto& [key, rule] : schema.items()) {
    if (key == "description" || key == "default" || key == "$schema" || key == "title" ||
        key == "$defs") {
      continue;
    } else if (key == "$ref") {
      ok &= valid(root, root.at(json::json_pointer(rule.get<std::string>().substr(1))), value);
    } else if (key == "type") {
      ok &= rule.is_array() ? std::any_of(rule.begin(), rule.end(),
                                          [&](const json& type) { return has_type(value, type); })
                            : has_type(value, rule);
    } else if (key == "enum") {
      ok &= std::find(rule.begin(), rule.end(), value) != rule.end();
    } else if (key == "const") {
      ok &= rule == value;
    } else if (key == "minimum") {
      ok &= !value.is_number() || value >= rule;
    } else if (key == "maximum") {
      ok &= !value.is_number() || value <= rule;
    } else if (key == "exclusiveMinimum") {
      ok &= !value.is_number() || value > rule;
    } else if (key == "exclusiveMaximum") {
      ok &= !value.is_number() || value < rule;
    } else if (key == "minLength") {
      ok &= !value.is_string() || value.get<std::string>().size() >= rule;
    } else if (key == "pattern") {
      ok &= !value.is_string() || matches(rule, value);
    } else if (key == "minItems") {
      ok &= !value.is_array() || value.size() >= rule;
    } else if (key == "items") {
      ok &= !value.is_array() || std::all_of(value.begin(), value.end(), [&](const json& item) {
        return valid(root, rule, item);
      });
    } else if (key == "required") {
      ok &= !value.is_object() || std::all_of(rule.begin(), rule.end(), [&](const json& name) {
        return value.contains(name.get<std::string>());
      });
    } else if (key == "properties") {
      if (!value.is_object()) continue;
      for (const auto& [name, item] : value.items()) {
        if (rule.contains(name)) ok &= valid(root, rule[name], item);
      }
    } else if (key == "additionalProperties") {
      if (!value.is_object()) continue;
      for (const auto& [name, item] : value.items()) {
        ok &= rule.is_object() ? valid(root, rule, item) : schema["properties"].contains(name);
      }
    } else if (key == "anyOf") {
      ok &= count(rule) >= 1;
    } else if (key == "oneOf") {
      ok &= count(rule) == 1;
    } else {
      ADD_FAILURE() << "unknown keyword " << key;
    }
  }
  return ok;
}

class SchemaTest : public testing::Test {
 protected:
  bool accepts(const std::string& yaml) const {
    return valid(schema_, schema_, to_json(YAML::Load(yaml)));
  }
  bool parses(const std::string& yaml) {
    try {
      parse_config(yaml, "c.yaml", {}, registry_);
      return true;
    } catch (const Error&) {
      return false;
    }
  }

  Registry registry_ = test_registry();
  const json schema_ = config_schema(registry_);
};

constexpr const char* kRest =
    "model: qwen3-8b\nsource: {synthetic: {context: 4K}}\npipeline: sign_vq+intq > full > "
    "sparse_flash\n";

TEST_F(SchemaTest, AgreesWithTheParser) {
  for (const char* good : {
           "",
           "threads: 4",
           "budgets: [256, 64K, 0.5]",
           "budgets: 0.1",
           "measure: {steps: 4, warmup: 0, metrics: [recall, memory]}",
           "measure: {metrics: recall}",
           "model: {layers: 1, query_heads: 8, kv_heads: 2, head_dim: 64, rope_theta: 1e4}",
           "model: {preset: qwen3-8b, layers: 2}",
           "source: {synthetic: {kind: needle, context: [1024, 2K], batch: max, dtype: bf16}}",
           "source: {synthetic: , steps: 4}",
           "pipeline: {keys: {codec: sign_vq, magnitude_bits: 4, scale_group: 32}, values: {codec: "
           "rot_lm}, selector: {name: self_index, budget: 64K, threshold: 0.25, schedule: 2, "
           "pinned: 8, pin: first, keep_generated: true}, attention: {kernel: sparse_flash, fast: "
           "false}, device: cpu, force: {selector: cpu}}",
           "pipeline: {keys: {codec: sign_vq}, values: {codec: intq}, selector: {name: full}, "
           "attention: {kernel: sparse_flash}, device: 'cuda:1'}",
           "pipelines: [sign_vq+intq > full > sparse_flash]",
       }) {
    std::string text = kRest;
    const std::string line = good;
    for (const char* key : {"model:", "source:", "pipeline"}) {
      if (!line.starts_with(key)) continue;
      const size_t start = text.find(key);
      text.erase(start, text.find('\n', start) + 1 - start);
    }
    text += line;
    EXPECT_TRUE(accepts(text)) << text;
    EXPECT_TRUE(parses(text)) << text;
  }
  for (const char* bad : {
           "thread: 4",
           "threads: -1",
           "threads: many",
           "budgets: []",
           "budgets: 1.5",
           "measure: {metrics: [speed]}",
           "model: gpt",
           "model: {layers: 1}",
           "model: {layers: 1, query_heads: 8, kv_heads: 2, head_dim: 80}",
           "source: {}",
           "source: {trace: a, synthetic: {}}",
           "source: {synthetic: {kind: other}}",
           "source: {synthetic: {context: 0}}",
           "source: {synthetic: {}, prompt: 3}",
           "pipeline: sign_vq",
           "pipelines: []",
           "pipeline: {keys: {codec: sign_vq}}",
           "pipeline: {keys: {codec: sign_vq}, values: {codec: intq}, selector: {name: full}, "
           "attention: {kernel: other}}",
           "pipeline: {keys: {codec: sign_vq}, values: {codec: intq}, selector: {name: full, "
           "budget: 4}, attention: {kernel: sparse_flash}}",
           "pipeline: {keys: {codec: sign_vq, magnitude_bits: 3}, values: {codec: intq}, selector: "
           "{name: full}, attention: {kernel: sparse_flash}}",
           "pipeline: {keys: {codec: sign_vq}, values: {codec: intq}, selector: {name: full}, "
           "attention: {kernel: sparse_flash}, device: gpu}",
           "pipeline: {keys: {codec: sign_vq}, values: {codec: intq}, selector: {name: full}, "
           "attention: {kernel: sparse_flash}, device: 'cuda:x'}",
       }) {
    std::string text = kRest;
    const std::string line = bad;
    for (const char* key : {"model:", "source:", "pipeline"}) {
      if (!line.starts_with(key)) continue;
      const size_t start = text.find(key);
      text.erase(start, text.find('\n', start) + 1 - start);
    }
    text += line;
    EXPECT_FALSE(accepts(text)) << text;
    EXPECT_FALSE(parses(text)) << text;
  }
}

TEST_F(SchemaTest, ASourceMayLackWhereNoneIsRead) {
  const std::string text = "pipeline: sign_vq+intq > full > sparse_flash\n";
  EXPECT_TRUE(accepts(text));
  EXPECT_FALSE(parses(text));
  EXPECT_EQ(parse_config(text, "c.yaml", {}, registry_, SourceUse::kIgnored).pipelines.size(), 1u);
}

template <typename Keys>
std::set<std::string> key_set(const Keys& keys) {
  return {keys.begin(), keys.end()};
}

std::set<std::string> names(const json& properties) {
  std::set<std::string> names;
  for (const auto& [name, value] : properties.items()) names.insert(name);
  return names;
}

TEST_F(SchemaTest, ListsEveryKeyTheParserTakes) {
  EXPECT_EQ(names(schema_["properties"]), key_set(fields::kTopKeys));
  EXPECT_EQ(names(schema_["properties"]["model"]["anyOf"][1]["properties"]),
            key_set(fields::kModelKeys));
  EXPECT_EQ(names(schema_["properties"]["measure"]["properties"]), key_set(fields::kMeasureKeys));
  EXPECT_EQ(names(schema_["$defs"]["pipeline"]["anyOf"][1]["properties"]),
            key_set(fields::kPipelineKeys));
  EXPECT_EQ(names(schema_["$defs"]["named_source"]["properties"]),
            key_set(fields::kNamedSourceKeys));
  std::set<std::string> entry = names(schema_["$defs"]["entry"]["anyOf"][2]["properties"]);
  EXPECT_EQ(entry, key_set(fields::kEntryKeys));
  entry.merge(key_set(fields::kPipelineKeys));
  entry.erase("pipeline");
  EXPECT_EQ(names(schema_["$defs"]["entry"]["anyOf"][1]["properties"]), entry);
  const json& sources = schema_["properties"]["source"]["oneOf"];
  std::set<std::string> source = names(sources[0]["properties"]);
  source.merge(names(sources[1]["properties"]));
  EXPECT_EQ(source, key_set(fields::kSourceKeys));
  EXPECT_EQ(names(sources[1]["properties"]["synthetic"]["properties"]),
            key_set(fields::kSyntheticKeys));
}

TEST_F(SchemaTest, NestsSelectors) {
  const auto agree = [&](const std::string& selector, bool good) {
    const std::string text =
        "model: qwen3-8b\nsource: {synthetic: {context: 4K}}\npipeline:\n"
        "  keys: {codec: sign_vq}\n  values: {codec: intq}\n"
        "  attention: {kernel: sparse_flash}\n  selector: " +
        selector + "\n";
    EXPECT_EQ(accepts(text), good) << selector;
    EXPECT_EQ(parses(text), good) << selector;
  };
  agree("{name: top_p, base: {name: self_index, budget: 64}, pinned: 8}", true);
  agree("{name: split, base: {name: top_p, p: 0.5, table: a.h5, base: {name: full}}}", true);
  agree("{name: top_p}", false);
  agree("{name: top_p, base: full}", false);
  agree("{name: top_p, base: {name: self_index, pinned: 8}}", false);
  agree("{name: top_p, base: {name: split}}", false);
  agree("{name: full, base: {name: self_index}}", false);
}

TEST_F(SchemaTest, TakesOptionsFromThePlugins) {
  const json& selector = schema_["$defs"]["pipeline"]["anyOf"][1]["properties"]["selector"];
  EXPECT_EQ(selector["properties"]["name"]["enum"], (json{"full", "self_index", "split", "top_p"}));
  const json& options = selector["oneOf"][1]["properties"];
  EXPECT_EQ(options["name"]["const"], "self_index");
  EXPECT_EQ(options["budget"]["default"], 256);
  EXPECT_EQ(options["budget"]["description"], "tokens to select");
  EXPECT_EQ(options["schedule"]["enum"], (json{"auto", "1", 1, "2", 2}));
  EXPECT_EQ(options["threshold"],
            json::parse(R"({"type": "number", "minimum": 0, "maximum": 1, "default": 0.5,
                            "description": "least score"})"));
  EXPECT_EQ(options["keep_generated"]["default"], false);
}

}  // namespace
}  // namespace sikv
