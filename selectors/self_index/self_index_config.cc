#include <string>

#include "selectors/self_index/self_index.h"

namespace sikv::self_index {

Config::Config(const Options& options)
    : budget(options.budget("budget")),
      group(options.choice("group") == "mean" ? Group::kMean : Group::kMaxOverHeads),
      six_bit(options.choice("tables") == "6bit"),
      rerank(static_cast<int>(options.integer("rerank"))),
      norm_weighting(options.choice("weighting") == "norm"),
      scan_every(static_cast<int>(options.integer("scan_every"))),
      auto_schedule(options.choice("schedule") == "auto"),
      tolerance(options.number("tolerance")),
      refresh_cosine(options.number("refresh_cosine")),
      window(static_cast<int>(options.integer("window"))),
      stagger(options.flag("stagger")) {
  if (auto_schedule && scan_every != 1) {
    throw Refused("self_index takes schedule: auto or scan_every: " + std::to_string(scan_every) +
                  ", not both: auto chooses the period of each head itself");
  }
}

}  // namespace sikv::self_index
