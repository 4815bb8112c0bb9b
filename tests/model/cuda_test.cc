// The model on a GPU beside the model on the CPU, with every switch a model has: layer by layer,
// logits, steps with pipelines inside, recorded beside eager, and what goes wrong.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "framework/config/pipeline_text.h"
#include "framework/model/dense_pipeline.h"
#include "framework/model/evaluate.h"
#include "framework/model/random_model.h"
#include "framework/model/transformer.h"
#include "tests/support/plugins.h"

namespace sikv {
namespace {

using testing::cpu;
using testing::gpu;
using testing::gpu_missing;
using testing::registry;

constexpr const char* kSparse =
    "rot_lm(bits=3)+rot_lm(bits=2) > self_index(budget=64,rerank=4,pinned=16) > sparse_flash";

struct Feature {
  const char* name;
  int query_heads, kv_heads, head_dim;
  bool bias, qk_norm, tied;
  const char* rope_scaling;
};

// G 1, 3 and 4; every D; every rope rule.
constexpr Feature kFeatures[] = {
    {"plain", 2, 2, 64, false, false, true, ""},
    {"llama3", 8, 2, 64, false, false, false,
     R"({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
         "original_max_position_embeddings": 256})"},
    {"bias", 6, 2, 96, true, false, true, R"({"rope_type": "linear", "factor": 4})"},
    {"qk_norm", 4, 1, 128, false, true, false,
     R"({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512})"},
    {"everything", 3, 1, 256, true, true, true, ""},
};

ModelFile made(const Feature& feature, WeightType type) {
  Random random(7);
  ModelFile model;
  ModelConfig& config = model.config;
  config.architecture = "llama";
  config.name = feature.name;
  config.num_layers = 3;
  config.num_query_heads = feature.query_heads;
  config.num_kv_heads = feature.kv_heads;
  config.head_dim = feature.head_dim;
  config.hidden_size = 192;
  config.intermediate_size = 320;
  config.vocab_size = 512;
  config.max_positions = 4096;
  config.rope_scaling = feature.rope_scaling;
  const auto matrix = [&](int64_t rows, int64_t columns) {
    std::vector<float> normal(static_cast<size_t>(rows * columns));
    random.fill_normal(normal);
    WeightMatrix weights{type, rows, columns, {}, {}};
    weights.data.resize(normal.size() * static_cast<size_t>(weight_bytes(type)));
    const float scale = 1 / std::sqrt(static_cast<float>(columns));
    if (type == WeightType::kInt8) weights.scale.assign(static_cast<size_t>(rows), scale / 32);
    for (int64_t i = 0; i < std::ssize(normal); ++i) {
      const float x = normal[static_cast<size_t>(i)];
      if (type == WeightType::kInt8) {
        weights.data[static_cast<size_t>(i)] = static_cast<std::byte>(
            static_cast<int8_t>(std::clamp(std::round(32 * x), -127.0f, 127.0f)));
        continue;
      }
      const int32_t dtype = type == WeightType::kFp32   ? SIKV_FP32
                            : type == WeightType::kFp16 ? SIKV_FP16
                                                        : SIKV_BF16;
      sikv_store(weights.data.data(), dtype, i, scale * x);
    }
    return weights;
  };
  const auto vector = [&](int64_t n, float mean, float deviation) {
    std::vector<float> values(static_cast<size_t>(n));
    random.fill_normal(values);
    for (float& value : values) value = mean + deviation * value;
    return values;
  };
  const int64_t D = config.head_dim, hidden = config.hidden_size;
  const int64_t q = D * config.num_query_heads, kv = D * config.num_kv_heads;
  model.embedding = matrix(config.vocab_size, hidden);
  if (!feature.tied) model.output = matrix(config.vocab_size, hidden);
  model.norm = vector(hidden, 1, 0.1f);
  for (int l = 0; l < config.num_layers; ++l) {
    ModelLayer& layer = model.layers.emplace_back();
    layer.attention_norm = vector(hidden, 1, 0.1f);
    layer.mlp_norm = vector(hidden, 1, 0.1f);
    layer.wq = matrix(q, hidden);
    layer.wk = matrix(kv, hidden);
    layer.wv = matrix(kv, hidden);
    layer.wo = matrix(hidden, q);
    layer.w_gate = matrix(config.intermediate_size, hidden);
    layer.w_up = matrix(config.intermediate_size, hidden);
    layer.w_down = matrix(hidden, config.intermediate_size);
    if (feature.bias) {
      layer.bq = vector(q, 0, 0.3f);
      layer.bk = vector(kv, 0, 0.3f);
      layer.bv = vector(kv, 0, 0.3f);
    }
    if (feature.qk_norm) {
      layer.q_norm = vector(D, 1, 0.1f);
      layer.k_norm = vector(D, 1, 0.1f);
    }
  }
  return model;
}

std::vector<int32_t> random_tokens(int64_t n, uint64_t seed = 1) {
  Random random(seed);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < n; ++i) tokens.push_back(static_cast<int32_t>(random.below(512)));
  return tokens;
}

std::vector<float> floats(const std::vector<std::byte>& data, int32_t dtype) {
  std::vector<float> values(data.size() / static_cast<size_t>(sikv_dtype_bytes(dtype)));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = sikv_load(data.data(), dtype, static_cast<int64_t>(i));
  }
  return values;
}

// ||got - expected|| / ||expected||
double error(const std::vector<float>& got, const std::vector<float>& expected) {
  EXPECT_EQ(got.size(), expected.size());
  double squares = 0, difference = 0;
  for (size_t i = 0; i < std::min(got.size(), expected.size()); ++i) {
    squares += double{expected[i]} * expected[i];
    difference += (double{got[i]} - expected[i]) * (double{got[i]} - expected[i]);
  }
  return std::sqrt(difference / squares);
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

struct Precision {
  WeightType weights;
  int32_t dtype;
  double tolerance;
};

// fp32 products differ in the order of sums alone. In fp16 and bf16 every activation is rounded (by
// 2^-12 and 2^-9 on average) before each of some ten products in a row.
constexpr Precision kPrecisions[] = {{WeightType::kFp32, SIKV_FP32, 2e-5},
                                     {WeightType::kFp16, SIKV_FP16, 5e-3},
                                     {WeightType::kBf16, SIKV_FP16, 3e-2},
                                     {WeightType::kInt8, SIKV_FP16, 5e-3}};

class CudaModel : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!gpu_missing().empty()) GTEST_SKIP() << gpu_missing();
  }
};

// 2300 tokens are two chunks and no whole number of tiles.
TEST_F(CudaModel, PrefillAndLogitsMatchTheCpuLayerByLayer) {
  for (const Feature& feature : kFeatures) {
    for (const Precision& precision : kPrecisions) {
      SCOPED_TRACE(fmt::format("{}, weights {}", feature.name, int(precision.weights)));
      Transformer slow(made(feature, precision.weights), cpu(3));
      Transformer fast(made(feature, precision.weights), gpu());
      const bool is_long = precision.weights == WeightType::kFp16;
      for (const int64_t n : {int64_t{1}, int64_t{3}, int64_t{257}, int64_t{is_long ? 2300 : 65}}) {
        const auto tokens = random_tokens(n);
        const Prompt expected = slow.prefill(tokens, precision.dtype, 130);
        const Prompt got = fast.prefill(tokens, precision.dtype, 130);
        ASSERT_EQ(got.layers.size(), expected.layers.size());
        for (size_t l = 0; l < got.layers.size(); ++l) {
          for (const auto part : {&PromptLayer::k, &PromptLayer::v, &PromptLayer::q}) {
            EXPECT_LT(error(floats(got.layers[l].*part, precision.dtype),
                            floats(expected.layers[l].*part, precision.dtype)),
                      precision.tolerance)
                << n << " tokens, layer " << l;
          }
        }
        EXPECT_LT(error(got.hidden, expected.hidden), precision.tolerance);
        std::vector<float> a(512), b(512);
        fast.logits(got.hidden.data(), 1, a.data());
        slow.logits(expected.hidden.data(), 1, b.data());
        EXPECT_LT(error(a, b), precision.tolerance) << n;
      }
    }
  }
}

// A ragged batch: prompts of 300 and 77 tokens, then steps over a page's end.
class Batch {
 public:
  Batch(Transformer& model, const std::vector<Prompt>& prompts, const char* pipeline, int32_t dtype)
      : model_(model),
        pipeline_(parse_pipeline(pipeline, registry()), registry(), model.device(),
                  model.shape(dtype, 700, 2), 300) {
    const ModelConfig& config = model.config();
    const int64_t kv = int64_t{config.num_kv_heads} * config.head_dim;
    const int64_t bytes = sikv_dtype_bytes(dtype);
    for (int l = 0; l < config.num_layers; ++l) {
      const auto joined = [&](std::vector<std::byte> PromptLayer::*part) {
        std::vector<std::byte> all;
        for (const Prompt& prompt : prompts) {
          const auto& own = prompt.layers[static_cast<size_t>(l)].*part;
          all.insert(all.end(), own.begin(), own.end());
        }
        return all;
      };
      const auto k = joined(&PromptLayer::k), v = joined(&PromptLayer::v),
                 q = joined(&PromptLayer::q);
      const auto tokens = [&](size_t b) {
        return static_cast<int32_t>(std::ssize(prompts[b].layers[0].k) / (kv * bytes));
      };
      const int32_t first[] = {0, tokens(0)}, count[] = {tokens(0), tokens(1)};
      const sikv_rows keys{k.data(), dtype, tokens(0) + tokens(1), first,
                           count,    kv,    config.head_dim};
      sikv_rows values = keys;
      values.data = v.data();
      pipeline_.prefill(l, keys, values, q.data(), 64);
      positions_ = {tokens(0), tokens(1)};
    }
  }

  std::vector<float> step(int32_t token, Pipeline::StepMode mode) {
    std::vector<float> logits(2 * 512);
    const int32_t tokens[] = {token, 511 - token};
    model_.step(pipeline_, tokens, positions_, logits.data(), mode);
    for (int64_t& position : positions_) ++position;
    return logits;
  }
  std::vector<int32_t> step_greedy(int32_t token) {
    std::vector<int32_t> next(2);
    const int32_t tokens[] = {token, 511 - token};
    model_.step_greedy(pipeline_, tokens, positions_, next.data());
    for (int64_t& position : positions_) ++position;
    return next;
  }

 private:
  Transformer& model_;
  Pipeline pipeline_;
  std::vector<int64_t> positions_;
};

std::vector<Prompt> ragged(Transformer& model, int32_t dtype) {
  std::vector<Prompt> prompts;
  for (const int64_t n : {300, 77}) {
    prompts.push_back(model.prefill(random_tokens(n, static_cast<uint64_t>(n)), dtype, 64));
  }
  return prompts;
}

TEST_F(CudaModel, StepsOfARaggedBatchMatchTheCpu) {
  for (const Feature& feature : kFeatures) {
    for (const Precision& precision : kPrecisions) {
      SCOPED_TRACE(fmt::format("{}, weights {}", feature.name, int(precision.weights)));
      Transformer slow(made(feature, precision.weights), cpu(3));
      Transformer fast(made(feature, precision.weights), gpu());
      const auto prompts = ragged(slow, precision.dtype);
      Batch a(slow, prompts, kDensePipeline, precision.dtype);
      Batch b(fast, prompts, kDensePipeline, precision.dtype);
      // Caches round keys of fp32 prompts to fp16.
      const double tolerance = std::max(precision.tolerance, 1e-3);
      for (int32_t i = 0; i < 6; ++i) {
        EXPECT_LT(error(b.step(i * 31, Pipeline::StepMode::kRecorded),
                        a.step(i * 31, Pipeline::StepMode::kRecorded)),
                  tolerance)
            << "step " << i;
      }
    }
  }
}

void expect_recorded_equal_eager_and_greedy(int32_t steps) {
  for (const char* const pipeline : {kDensePipeline, kSparse}) {
    Transformer model(made(kFeatures[1], WeightType::kFp16), gpu());
    const auto prompts = ragged(model, SIKV_FP16);
    Batch recorded(model, prompts, pipeline, SIKV_FP16), eager(model, prompts, pipeline, SIKV_FP16),
        greedy(model, prompts, pipeline, SIKV_FP16);
    for (int32_t i = 0; i < steps; ++i) {
      const auto a = recorded.step(i, Pipeline::StepMode::kRecorded);
      ASSERT_EQ(a, eager.step(i, Pipeline::StepMode::kEager)) << pipeline << ", step " << i;
      const auto next = greedy.step_greedy(i);
      for (int64_t b = 0; b < 2; ++b) {
        const auto row = a.begin() + b * 512;
        EXPECT_EQ(next[static_cast<size_t>(b)], std::max_element(row, row + 512) - row);
      }
    }
  }
}

// 250 steps take the first sequence and the second over the end of a page, so that graphs with and
// without a flush run and one is recorded anew.
TEST_F(CudaModel, RecordedStepsEqualEagerOnesAndGreedyOnes) {
  expect_recorded_equal_eager_and_greedy(250);
}

// For compute-sanitizer (scripts/test gpu).
TEST_F(CudaModel, RecordedStepsOfASmallCacheEqualEagerOnes) {
  expect_recorded_equal_eager_and_greedy(3);
}

// Teacher-forced: what dense attention says on a GPU and on the CPU, in nats.
TEST_F(CudaModel, DenseKlBetweenGpuAndCpuIsNothing) {
  const char* const file = std::getenv("SIKV_TEST_MODEL");  // a real one instead of a random one
  const auto open = [&](Device& device) {
    return Transformer(file != nullptr ? read_model(file) : made(kFeatures[3], WeightType::kFp16),
                       device);
  };
  Transformer slow = open(cpu(3)), fast = open(gpu());
  const int64_t prompt = 700, steps = 24, vocab = slow.config().vocab_size;
  Random random(3);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i <= prompt + steps; ++i) {
    tokens.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
  }
  const auto steps_of = [&](Transformer& model) {
    Pipeline pipeline(parse_pipeline(kDensePipeline, registry()), registry(), model.device(),
                      model.shape(SIKV_FP16, prompt + steps), static_cast<int>(steps));
    model.fill(pipeline,
               model.prefill(std::span(tokens).first(static_cast<size_t>(prompt)), SIKV_FP16, 64));
    std::vector<float> all(static_cast<size_t>(steps * vocab));
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t position = prompt + i;
      model.step(pipeline, {&tokens[static_cast<size_t>(position)], 1}, {&position, 1},
                 all.data() + i * vocab);
    }
    return all;
  };
  const auto a = steps_of(slow), b = steps_of(fast);
  double largest = 0, mean = 0;
  for (int64_t i = 0; i < steps; ++i) {
    const auto log_sum = [&](const std::vector<float>& x) {
      double sum = 0;
      const float high = *std::max_element(x.begin() + i * vocab, x.begin() + (i + 1) * vocab);
      for (int64_t t = 0; t < vocab; ++t)
        sum += std::exp(double{x[static_cast<size_t>(i * vocab + t)]} - high);
      return high + std::log(sum);
    };
    const double of_a = log_sum(a), of_b = log_sum(b);
    double kl = 0;
    for (int64_t t = 0; t < vocab; ++t) {
      const size_t at = static_cast<size_t>(i * vocab + t);
      kl += std::exp(a[at] - of_a) * ((a[at] - of_a) - (b[at] - of_b));
    }
    largest = std::max(largest, kl);
    mean += kl / static_cast<double>(steps);
  }
  RecordProperty("mean_kl", std::to_string(mean));
  std::printf("KL of dense attention, GPU against CPU: mean %.2e, largest %.2e\n", mean, largest);
  EXPECT_LT(mean, 1e-4);
  EXPECT_LT(largest, 1e-3);
}

// What `sikv eval` says that a step reads, on a GPU and on the CPU.
TEST_F(CudaModel, EvaluationsCountTheSameBytes) {
  Transformer slow(made(kFeatures[1], WeightType::kFp16), cpu(3));
  Transformer fast(made(kFeatures[1], WeightType::kFp16), gpu());
  const int64_t prompt = 700, steps = 80;  // a page fills on the way
  const auto evaluate = [&](Transformer& model, const char* text) {
    Evaluation evaluation(model, {"random", random_tokens(prompt + steps + 1, 5), prompt, steps},
                          SIKV_FP16, 64, false, registry(), model.device());
    return evaluation.run(parse_pipeline(text, registry()), model.device());
  };
  for (const char* const text :
       {"fp16+fp16 > full(pinned=8) > sparse_flash",
        "rot_lm+rot_lm > self_index(budget=32,tables=6bit,pinned=8) > sparse_flash",
        "rot_lm+rot_lm > self_index(budget=32,tables=6bit,rerank=4,pinned=8) > sparse_flash"}) {
    SCOPED_TRACE(text);
    const Evaluated a = evaluate(slow, text), b = evaluate(fast, text);
    ASSERT_TRUE(a.scan_bytes && b.scan_bytes && a.attended_bytes && b.attended_bytes);
    EXPECT_EQ(b.scan_bytes, a.scan_bytes);
    EXPECT_EQ(b.attended_bytes, a.attended_bytes);
  }
}

TEST_F(CudaModel, RandomWeightsAreDrawnOnTheDevice) {
  ModelSpec spec;
  spec.layers = 2;
  spec.query_heads = 4;
  spec.kv_heads = 2;
  spec.head_dim = 64;
  for (const WeightType type : {WeightType::kFp16, WeightType::kBf16, WeightType::kInt8}) {
    Transformer model(random_model(spec, type, 1, gpu()), gpu());
    const auto tokens = random_tokens(40);
    const Prompt prompt = model.prefill(tokens, SIKV_FP16, 1);
    std::vector<float> logits(static_cast<size_t>(model.config().vocab_size));
    model.logits(prompt.hidden.data(), 1, logits.data());
    double squares = 0;
    for (const float logit : logits) squares += double{logit} * logit;
    // Normed activations times normals of deviation 1 / sqrt(hidden).
    EXPECT_NEAR(std::sqrt(squares / static_cast<double>(logits.size())), 1, 0.05);
    const int64_t position = 3;
    int32_t next = -1;
    model.step_without_cache({tokens.data(), 1}, {&position, 1}, &next);
    EXPECT_GE(next, 0);
  }
}

TEST_F(CudaModel, NamesWhereTheFirstNanComesFrom) {
  const auto tokens = random_tokens(300);
  const auto prefill_says = [&](ModelFile file, int32_t dtype) {
    Transformer model(std::move(file), gpu());
    return refusal([&] { model.prefill(tokens, dtype, 1); });
  };
  const auto fp32 = [](WeightMatrix& matrix) {
    return reinterpret_cast<float*>(matrix.data.data());
  };
  ModelFile gate = made(kFeatures[3], WeightType::kFp32);
  std::fill_n(fp32(gate.layers[1].w_gate), 192, std::numeric_limits<float>::max());
  EXPECT_NE(prefill_says(std::move(gate), SIKV_FP32)
                .find("layer 1 of qk_norm gives a NaN or infinity at position 0"),
            std::string::npos);
  ModelFile last = made(kFeatures[3], WeightType::kFp32);
  std::fill_n(fp32(last.layers[2].w_gate), 192, std::numeric_limits<float>::max());
  EXPECT_NE(prefill_says(std::move(last), SIKV_FP32)
                .find("layer 2 of qk_norm gives a NaN or infinity at position 0"),
            std::string::npos);
  ModelFile loud = made(kFeatures[3], WeightType::kFp32);
  for (int64_t i = 0; i < 192; ++i) fp32(loud.layers[1].wv)[i] *= 1e7f;
  const std::string said = prefill_says(std::move(loud), SIKV_FP16);
  EXPECT_NE(said.find("V of layer 1 holds a NaN or infinity, or more than its cache's type can"),
            std::string::npos)
      << said;

  // A step names it, too, and the model goes on after it.
  ModelFile output = made(kFeatures[3], WeightType::kFp32);
  std::fill_n(fp32(output.output), 192, std::numeric_limits<float>::max());
  Transformer model(std::move(output), gpu());
  const auto prompts = ragged(model, SIKV_FP32);
  Batch batch(model, prompts, kDensePipeline, SIKV_FP32);
  for (const auto mode : {Pipeline::StepMode::kRecorded, Pipeline::StepMode::kEager}) {
    const std::string step = refusal([&] { batch.step(3, mode); });
    EXPECT_NE(step.find("the output layer of qk_norm"), std::string::npos) << step;
  }
  EXPECT_EQ(refusal([&] { model.prefill(tokens, SIKV_FP32, 1); }), "");
}

}  // namespace
}  // namespace sikv
