#include "framework/model/random_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "framework/base/error.h"
#include "framework/device/device.h"
#include "framework/model/transformer.h"

namespace sikv {
namespace {

ModelSpec shape(const std::string& preset) {
  ModelSpec shape;
  shape.preset = preset;
  shape.layers = 2;
  shape.query_heads = 4;
  shape.kv_heads = 2;
  shape.head_dim = 64;
  return shape;
}

TEST(RandomModel, RunsWithEveryWeightType) {
  const auto device = open_cpu_device(2);
  for (const WeightType type :
       {WeightType::kFp32, WeightType::kFp16, WeightType::kBf16, WeightType::kInt8}) {
    Transformer model(random_model(shape(""), type, 1, *device), *device);
    EXPECT_EQ(model.config().hidden_size, 256);
    const std::vector<int32_t> tokens = {1, 2, 3};
    std::vector<float> logits(static_cast<size_t>(model.config().vocab_size));
    const Prompt prompt = model.prefill(tokens, SIKV_FP16, 1);
    model.logits(prompt.hidden.data(), 1, logits.data());
    const auto [low, high] = std::minmax_element(logits.begin(), logits.end());
    EXPECT_TRUE(std::isfinite(*low));
    EXPECT_GT(*high - *low, 1);
    const int64_t position = 3;
    int32_t next = -1;
    model.step_without_cache({tokens.data(), 1}, {&position, 1}, &next);
    EXPECT_GE(next, 0);
  }
}

TEST(RandomModel, PresetsHaveTheirPublishedSizes) {
  const auto device = open_cpu_device(1);
  ModelSpec smol = shape("smollm2-135m");
  smol.query_heads = 9;
  smol.kv_heads = 3;
  const ModelFile model = random_model(smol, WeightType::kInt8, 1, *device);
  EXPECT_EQ(model.embedding.rows, 49152);
  EXPECT_EQ(model.embedding.columns, 576);
  EXPECT_EQ(model.output.rows, 0);
  EXPECT_EQ(model.layers[1].w_down.columns, 1536);
}

TEST(RandomModel, WhatDoesNotFitIsRefusedFirst) {
  const auto device = open_cpu_device(1);
  ModelSpec huge = shape("llama-3.1-8b");
  huge.layers = 1 << 16;
  try {
    random_model(huge, WeightType::kFp32, 1, *device);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("take smaller weights (int8), or fewer layers"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace sikv
