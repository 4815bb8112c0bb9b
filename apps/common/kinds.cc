#include "apps/common/kinds.h"

#include <vector>

#include "framework/base/error.h"
#include "framework/base/text.h"

namespace sikv {
namespace {

std::vector<std::string> names() {
  std::vector<std::string> names;
  for (const Kind& kind : kKinds) names.emplace_back(kind.name);
  return names;
}

}  // namespace

std::string kind_names() { return join(names()); }

sikv_kind parse_kind(const std::string& name) {
  for (const Kind& kind : kKinds) {
    if (name == kind.name) return kind.kind;
  }
  const std::string near = did_you_mean(name, names());
  throw Error("there is no kind '{}'{}", name,
              near.empty() ? "; the kinds are " + kind_names() : near);
}

}  // namespace sikv
