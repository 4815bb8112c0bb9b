#include "framework/config/config_tree.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>

namespace sikv {
namespace {

// Aliases may repeat a subtree, or even hold themselves: the limits are on what they expand to.
constexpr int kMaxNodes = 100000;
constexpr int kMaxDepth = 32;
constexpr size_t kMaxBytes = 1 << 20;

class Converter {
 public:
  explicit Converter(const std::string& name) : name_(name) {}

  ConfigNode convert(const YAML::Node& yaml, int depth = 0) {
    ConfigNode node;
    node.where = place(yaml.Mark());
    if (depth > kMaxDepth || ++count_ > kMaxNodes) {
      node.fail(
          "the document is nested deeper than {} levels or has more than {} values, which no "
          "config has; simplify it",
          kMaxDepth, kMaxNodes);
    }
    switch (yaml.Type()) {
      case YAML::NodeType::Undefined:
      case YAML::NodeType::Null:
        break;
      case YAML::NodeType::Scalar:
        node.type = ConfigNode::Type::kScalar;
        node.text = yaml.Scalar();
        break;
      case YAML::NodeType::Sequence:
        node.type = ConfigNode::Type::kList;
        for (const YAML::Node& item : yaml) node.items.push_back(convert(item, depth + 1));
        break;
      case YAML::NodeType::Map:
        node.type = ConfigNode::Type::kMap;
        for (const auto& entry : yaml) field(node, entry.first, entry.second, depth);
        break;
    }
    return node;
  }

 private:
  void field(ConfigNode& map, const YAML::Node& key, const YAML::Node& value, int depth) {
    const ConfigNode name = convert(key, depth + 1);
    if (!name.is_scalar()) name.fail("a key is {}, expected a name", name.shown());
    if (map.find(name.text) != nullptr) {
      name.fail("'{}' is given twice; remove one of them", name.text);
    }
    map.names.push_back(name.text);
    map.items.push_back(convert(value, depth + 1));
    map.items.back().name_where = name.where;
    // YAML places an empty value somewhere behind its key.
    if (map.items.back().type == ConfigNode::Type::kEmpty) map.items.back().where = name.where;
  }

  std::string place(const YAML::Mark& mark) const {
    return mark.is_null() ? name_ : fmt::format("{}:{}:{}", name_, mark.line + 1, mark.column + 1);
  }

  const std::string& name_;
  int count_ = 0;
};

void set_where(ConfigNode& node, const std::string& where) {
  node.where = node.name_where = where;
  for (ConfigNode& item : node.items) set_where(item, where);
}

}  // namespace

const ConfigNode* ConfigNode::find(std::string_view name) const {
  const auto found = std::find(names.begin(), names.end(), name);
  return found == names.end() ? nullptr : &items[static_cast<size_t>(found - names.begin())];
}

std::string ConfigNode::shown() const {
  switch (type) {
    case Type::kScalar:
      return fmt::format("'{}'", text);
    case Type::kList:
      return "a list";
    case Type::kMap:
      return "a map";
    default:
      return "empty";
  }
}

ConfigNode read_config_tree(const std::string& text, const std::string& name) {
  if (text.size() > kMaxBytes) {
    throw Error("{}: the document has {} bytes, expected at most {}; is it a config?", name,
                text.size(), kMaxBytes);
  }
  try {
    return Converter(name).convert(YAML::Load(text));
  } catch (const YAML::Exception& error) {
    const YAML::Mark mark = error.mark;
    throw Error("{}:{}:{}: not valid YAML: {}; check quotes, brackets and indentation there", name,
                mark.line + 1, mark.column + 1, error.msg);
  }
}

void override_config(ConfigNode& root, const std::string& assignment) {
  const std::string where = "--set " + assignment;
  const size_t equals = assignment.find('=');
  if (equals == 0 || equals == std::string::npos) {
    throw Error("{}: expected key=value, such as pipeline.selector.budget=512", where);
  }
  const std::string path = assignment.substr(0, equals);
  ConfigNode value = read_config_tree(assignment.substr(equals + 1), where);
  set_where(value, where);

  ConfigNode* node = &root;
  for (size_t start = 0; start <= path.size();) {
    const size_t end = std::min(path.find('.', start), path.size());
    const std::string step = path.substr(start, end - start);
    const std::string parent = start == 0 ? "the config" : "'" + path.substr(0, start - 1) + "'";
    start = end + 1;
    if (step.empty()) throw Error("{}: the key '{}' has an empty part", where, path);
    if (node->is_list()) {
      size_t index = 0;
      const auto [stop, failed] = std::from_chars(step.data(), step.data() + step.size(), index);
      if (failed != std::errc() || stop != step.data() + step.size() ||
          index >= node->items.size()) {
        throw Error("{}: {} is a list of {}, expected an index below that instead of '{}'", where,
                    parent, node->items.size(), step);
      }
      node = &node->items[index];
    } else if (node->is_scalar()) {
      throw Error("{}: {} is {}, not a map, so '{}' cannot be set in it; write it as a map", where,
                  parent, node->shown(), step);
    } else {
      node->type = ConfigNode::Type::kMap;
      auto found = std::find(node->names.begin(), node->names.end(), step);
      if (found == node->names.end()) {
        node->names.push_back(step);
        node->items.emplace_back();
        set_where(node->items.back(), where);
        node = &node->items.back();
      } else {
        node = &node->items[static_cast<size_t>(found - node->names.begin())];
      }
    }
  }
  *node = std::move(value);
}

}  // namespace sikv
