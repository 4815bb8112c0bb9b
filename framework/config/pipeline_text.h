// The one-line form of a pipeline. It heads every result row and parses back:
//
//   sign_vq(magnitude_bits=2)+intq(bits=2) > self_index(budget=2048,pinned=64) > sparse_flash @cuda
//
// Printed are the options that were given, in the order of the plugin's list, then pinned, pin and
// keep_generated; `@device` and forced variants (`sparse_flash[ref]`) where they are set.
#ifndef SIKV_FRAMEWORK_CONFIG_PIPELINE_TEXT_H_
#define SIKV_FRAMEWORK_CONFIG_PIPELINE_TEXT_H_

#include <string>
#include <string_view>

#include "framework/config/config.h"

namespace sikv {

std::string pipeline_text(const PipelineSpec& spec, const Registry& registry);

// Error with the column and what was expected there; ids and options are checked by the registry.
PipelineSpec parse_pipeline(std::string_view text, const Registry& registry);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CONFIG_PIPELINE_TEXT_H_
