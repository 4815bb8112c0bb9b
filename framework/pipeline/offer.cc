#include "framework/pipeline/offer.h"

#include <utility>

#include "framework/base/error.h"

namespace sikv {
namespace {

// The innermost selector that has the need itself.
const SelectorInstance& who_needs(const SelectorInstance& selector, uint32_t need) {
  const SelectorInstance* who = &selector;
  while (who->base() != nullptr && (who->base()->table().flags & need) != 0) who = who->base();
  return *who;
}

}  // namespace

std::vector<std::string> needs_of(const SelectorInstance& selector) {
  std::vector<std::string> needs;
  for (const auto& [need, name] :
       {std::pair(SIKV_SELECTOR_NEEDS_ALL_LAYERS, "every layer"),
        std::pair(SIKV_SELECTOR_NEEDS_ALL_QUERIES, "the queries of the whole prompt"),
        std::pair(SIKV_SELECTOR_NEEDS_W_O, "w_o")}) {
    if ((selector.table().flags & need) != 0) needs.emplace_back(name);
  }
  return needs;
}

void check_needs(const SelectorInstance& selector, const Offer& offer) {
  const auto refuse = [&](uint32_t need, const std::string& lack) {
    const SelectorInstance& who = who_needs(selector, need);
    throw Error("{}", who.placed(fmt::format("selector '{}' needs {}", who.variant().id, lack)));
  };
  const auto needs = [&](uint32_t need) { return (selector.table().flags & need) != 0; };
  if (needs(SIKV_SELECTOR_NEEDS_ALL_LAYERS) && offer.layers < offer.model_layers) {
    refuse(SIKV_SELECTOR_NEEDS_ALL_LAYERS,
           fmt::format("every layer of the model, but {} gives {} of {}: {}, and no source.layers",
                       offer.source, offer.layers, offer.model_layers, offer.remedy));
  }
  if (needs(SIKV_SELECTOR_NEEDS_ALL_QUERIES) && offer.first_query > 0) {
    refuse(SIKV_SELECTOR_NEEDS_ALL_QUERIES,
           fmt::format("the queries of every prompt position, but {} gives those from position {} "
                       "on: {}",
                       offer.source, offer.first_query, offer.remedy));
  }
  if (needs(SIKV_SELECTOR_NEEDS_W_O) && !offer.w_o) {
    refuse(SIKV_SELECTOR_NEEDS_W_O,
           fmt::format("w_o, the output projection of every layer, but {} gives none: {}",
                       offer.source, offer.remedy));
  }
}

}  // namespace sikv
