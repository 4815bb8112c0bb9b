// sikv throughput CONFIG --model: the same sweep with a whole model around the cache.
#ifndef SIKV_APPS_THROUGHPUT_MODEL_SWEEP_H_
#define SIKV_APPS_THROUGHPUT_MODEL_SWEEP_H_

#include <filesystem>
#include <string>
#include <vector>

#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/registry/registry.h"

namespace sikv {

struct ModelSweepFlags {
  std::string model;    // a model file, or "random": the config's model
  std::string weights;  // of a random one: fp32, fp16, bf16 or int8
  std::filesystem::path json;
  uint64_t memory = 0;
};

// The model and the caches are on `device`. Prints a table; after Ctrl-C what is finished,
// and throws Interrupted.
void run_model_sweep(const ModelSweepFlags& flags, const Config& config, const Registry& registry,
                     Device& device, const std::vector<std::string>& command_line);

}  // namespace sikv

#endif  // SIKV_APPS_THROUGHPUT_MODEL_SWEEP_H_
