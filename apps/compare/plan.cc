#include "apps/compare/plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "framework/config/pipeline_parts.h"
#include "framework/config/pipeline_text.h"
#include "framework/registry/options.h"

namespace sikv {
namespace {

constexpr const char* kUpperBound = "oracle";
constexpr const char* kLowerBound = "random";

}  // namespace

bool is_bound(const PipelineSpec& spec) {
  return spec.selector.id == kUpperBound || spec.selector.id == kLowerBound;
}

void Plan::add(const PipelineSpec& spec) {
  if (seen_.insert({spec.entry.source, pipeline_text(spec, registry_)}).second) {
    specs_.push_back(spec);
  }
}

std::string Plan::add_bounds(std::vector<std::string> budgets) {
  const PipelineSpec first = specs_.front();
  std::set<std::pair<std::string, std::string>> there;  // selector, budget
  for (const PipelineSpec& spec : specs_) {
    const std::string budget = budget_of(spec.selector);
    if (budget.empty()) continue;
    there.insert({spec.selector.id, budget});
    // An entry's own budgets are its own affair.
    if (!spec.entry.budgets.empty()) continue;
    if (std::find(budgets.begin(), budgets.end(), budget) == budgets.end()) {
      budgets.push_back(budget);
    }
  }
  if (budgets.empty()) budgets.push_back(budget_of({kUpperBound, {}, {}}));
  const size_t given = specs_.size();
  for (const char* bound : {kUpperBound, kLowerBound}) {
    for (const std::string& budget : budgets) {
      if (there.contains({bound, budget})) continue;
      PipelineSpec spec = first;
      spec.force.clear();
      spec.entry = {};
      spec.entry.label = bound;
      spec.device = "auto";
      spec.selector = {bound, {{"budget", budget}}, {}};
      spec.kernel = {"gather_attention", {}, {}};
      if (bound == kLowerBound) spec.keys = spec.values = {"fp16", {}, {}};
      add(spec);
    }
  }
  if (specs_.size() == given) return {};
  const std::string text = pipeline_text(first, registry_);
  return fmt::format(
      "  oracle, random: bounds that compare adds; oracle over {}, as the first pipeline, random "
      "over "
      "fp16+fp16\n",
      text.substr(0, text.find(" > ")));
}

// As written, or the default; empty for a selector without a budget.
std::string Plan::budget_of(const PluginSpec& selector) const {
  const PluginSpec* const holder = budget_holder(selector, registry_);
  if (holder == nullptr) return {};
  for (const auto& [name, value] : holder->options) {
    if (name == "budget") return value;
  }
  return find_option(registry_.options(SIKV_SELECTOR, holder->id), "budget", holder->id)
      .default_value;
}

}  // namespace sikv
