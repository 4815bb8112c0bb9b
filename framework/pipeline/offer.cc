#include "framework/pipeline/offer.h"

#include "framework/base/error.h"

namespace sikv {
namespace {

constexpr const char* kRemedy =
    "use a trace made by datasets/capture with --layers all --queries all --w-o, as "
    "scripts/fetch_full_trace does";

// The innermost selector that has the need itself.
std::string who_needs(const SelectorInstance& selector, uint32_t need) {
  const SelectorInstance* who = &selector;
  while (who->base() != nullptr && (who->base()->table().flags & need) != 0) who = who->base();
  return who->variant().id;
}

}  // namespace

void check_needs(const SelectorInstance& selector, const Offer& offer) {
  const auto needs = [&](uint32_t need) { return (selector.table().flags & need) != 0; };
  if (needs(SIKV_SELECTOR_NEEDS_ALL_LAYERS) && offer.layers < offer.model_layers) {
    throw Error(
        "selector '{}' needs every layer of the model, but {} gives {} of {}: {}, and no "
        "source.layers",
        who_needs(selector, SIKV_SELECTOR_NEEDS_ALL_LAYERS), offer.source, offer.layers,
        offer.model_layers, kRemedy);
  }
  if (needs(SIKV_SELECTOR_NEEDS_ALL_QUERIES) && offer.first_query > 0) {
    throw Error(
        "selector '{}' needs the queries of every prompt position, but {} gives those from "
        "position {} on: {}",
        who_needs(selector, SIKV_SELECTOR_NEEDS_ALL_QUERIES), offer.source, offer.first_query,
        kRemedy);
  }
  if (needs(SIKV_SELECTOR_NEEDS_W_O) && !offer.w_o) {
    throw Error(
        "selector '{}' needs w_o, the output projection of every layer, but {} gives none: {}",
        who_needs(selector, SIKV_SELECTOR_NEEDS_W_O), offer.source, kRemedy);
  }
}

}  // namespace sikv
