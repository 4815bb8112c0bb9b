// The rows of a comparison: pipelines of several configs, each once, and the bounds beside them.
#ifndef SIKV_APPS_COMPARE_PLAN_H_
#define SIKV_APPS_COMPARE_PLAN_H_

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "framework/config/config.h"
#include "framework/registry/registry.h"

namespace sikv {

class Plan {
 public:
  explicit Plan(const Registry& registry) : registry_(registry) {}

  // Unless the same pipeline on the same source is there already.
  void add(const PipelineSpec& spec);

  // The oracle with the codecs of the first pipeline and random with exact K and V, at the configs'
  // `budgets` and every other that occurs, unless a pipeline uses that selector at that budget
  // already. Returns a line of a legend that says so, empty if nothing was added.
  std::string add_bounds(std::vector<std::string> budgets);

  const std::vector<PipelineSpec>& specs() const { return specs_; }

 private:
  std::string budget_of(const PluginSpec& selector) const;

  const Registry& registry_;
  std::vector<PipelineSpec> specs_;
  std::set<std::pair<std::string, std::string>> seen_;  // source, printed form
};

// Whether it uses a selector that bounds what any other can reach: those stand beside every
// comparison and compete with nobody.
bool is_bound(const PipelineSpec& spec);

}  // namespace sikv

#endif  // SIKV_APPS_COMPARE_PLAN_H_
