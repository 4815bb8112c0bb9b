// A model with random weights: for timing, where only shapes count.
#ifndef SIKV_FRAMEWORK_MODEL_RANDOM_MODEL_H_
#define SIKV_FRAMEWORK_MODEL_RANDOM_MODEL_H_

#include <cstdint>

#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/model/model_file.h"

namespace sikv {

// With the layers, heads and head_dim of `shape`; the sizes that it lacks are those of its preset,
// without one those usual for its width. It takes any position and has no vocabulary. A GPU draws
// the matrices itself (ModelFile::random_seed), int8 ones as fp16. Error if the weights would not
// fit what `device` has free.
ModelFile random_model(const ModelSpec& shape, WeightType type, uint64_t seed,
                       const Device& device);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_RANDOM_MODEL_H_
