// A YAML document as a plain tree whose every node knows where it was written: the ground that
// config.cc checks and `--set` overrides.
#ifndef SIKV_FRAMEWORK_CONFIG_CONFIG_TREE_H_
#define SIKV_FRAMEWORK_CONFIG_CONFIG_TREE_H_

#include <fmt/format.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "framework/base/error.h"

namespace sikv {

struct ConfigNode {
  enum class Type { kEmpty, kScalar, kList, kMap };

  Type type = Type::kEmpty;
  std::string text;                // kScalar
  std::vector<ConfigNode> items;   // kList; the values of a kMap
  std::vector<std::string> names;  // kMap: keys, unique, in order
  std::string where;               // "file:line:column" or "--set a.b=1"
  std::string name_where;          // of its key, for a value of a map

  bool is_scalar() const { return type == Type::kScalar; }
  bool is_list() const { return type == Type::kList; }
  bool is_map() const { return type == Type::kMap; }

  // The value of a key, or nullptr.
  const ConfigNode* find(std::string_view name) const;

  // "a list", "a map", "'text'" or "empty", to follow "is".
  std::string shown() const;

  // Throws Error with `where` in front.
  template <typename... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw Error("{}: {}", where, fmt::format(format, std::forward<Args>(args)...));
  }
  // Runs `check`; its Error gets `where` in front.
  template <typename Check>
  auto at(Check&& check) const {
    try {
      return check();
    } catch (const Error& error) {
      throw Error("{}: {}", where, error.what());
    }
  }
};

// One YAML document. Error for bad syntax, a key given twice in one map, keys that are not plain
// text, and documents too large to be a config.
ConfigNode read_config_tree(const std::string& text, const std::string& name);

// Applies "a.b.0.c=value": maps get a key they lack, lists are indexed. The value is YAML.
void override_config(ConfigNode& root, const std::string& assignment);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CONFIG_CONFIG_TREE_H_
