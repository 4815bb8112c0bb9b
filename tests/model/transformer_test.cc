// The forward pass against datasets/tiny/golden.h5 (an fp64 pass, position by position), and
// against itself where the tiny prompts are too short: over chunks, and decode steps against
// prefill.
#include "framework/model/transformer.h"

#include <H5Cpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "framework/config/pipeline_text.h"
#include "tests/support/plugins.h"

namespace sikv {
namespace {

using testing::cpu;
using testing::registry;

constexpr const char* kModels[] = {"llama", "llama3", "qwen2", "qwen3"};
constexpr const char* kDense = "fp16+fp16 > full(pinned=0,keep_generated=true) > dense_attention";

std::string tiny(const std::string& name) {
  return std::string(SIKV_SOURCE_DIR) + "/datasets/tiny/" + name + ".h5";
}

Transformer load(const std::string& name, int threads = 3) {
  return Transformer(read_model(tiny(name)), cpu(threads));
}

template <typename T>
std::vector<T> golden(const std::string& name, const H5::PredType& type) {
  H5::H5File file(tiny("golden"), H5F_ACC_RDONLY);
  const H5::DataSet set = file.openDataSet(name);
  std::vector<T> values(static_cast<size_t>(set.getSpace().getSimpleExtentNpoints()));
  set.read(values.data(), type);
  return values;
}

std::vector<int32_t> golden_tokens(const std::string& model) {
  return golden<int32_t>(model + "/tokens", H5::PredType::NATIVE_INT32);
}

std::vector<float> golden_floats(const std::string& name) {
  return golden<float>(name, H5::PredType::NATIVE_FLOAT);
}

std::vector<int32_t> random_tokens(int64_t n, int64_t vocab, uint64_t seed = 1) {
  Random random(seed);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < n; ++i) {
    tokens.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
  }
  return tokens;
}

// Largest difference over the largest magnitude of `expected`.
double error(const float* got, const float* expected, size_t n) {
  double largest = 0, difference = 0;
  for (size_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::abs(double{expected[i]}));
    difference = std::max(difference, std::abs(double{got[i]} - expected[i]));
  }
  return difference / largest;
}

const float* floats(const std::vector<std::byte>& bytes) {
  return reinterpret_cast<const float*>(bytes.data());
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

// The golden file promises 1e-5 to a correct fp32 pass.
constexpr double kTolerance = 1e-5;

TEST(Transformer, OutputProjectionsAreTurnedAsSelectorsTakeThem) {
  Transformer model = load("qwen2");
  const ModelFile file = read_model(tiny("qwen2"));
  const WeightMatrix& wo = file.layers[1].wo;  // [hidden, Hq * D]
  ASSERT_NE(wo.rows, wo.columns);
  const std::vector<float> w_o = model.output_projection(1);
  ASSERT_EQ(std::ssize(w_o), wo.rows * wo.columns);
  std::vector<float> row(static_cast<size_t>(wo.columns));
  for (int64_t c = 0; c < wo.rows; ++c) {
    load_weights(wo, c, row.data());
    for (int64_t i = 0; i < wo.columns; ++i) {
      ASSERT_EQ(w_o[static_cast<size_t>(i * wo.rows + c)], row[static_cast<size_t>(i)]);
    }
  }
}

TEST(Transformer, PrefillMatchesTheGoldenLayerByLayer) {
  for (const std::string name : kModels) {
    Transformer model = load(name);
    const auto tokens = golden_tokens(name);
    const int num_queries = 7;
    const Prompt prompt = model.prefill(tokens, SIKV_FP32, num_queries);
    ASSERT_EQ(prompt.layers.size(), 2u);
    const auto k = golden_floats(name + "/k"), v = golden_floats(name + "/v");
    const auto q = golden_floats(name + "/q");
    for (size_t l = 0; l < 2; ++l) {
      const size_t kv = k.size() / 2, of_q = q.size() / 2;
      const size_t kept = of_q / tokens.size() * num_queries;
      ASSERT_EQ(prompt.layers[l].k.size(), kv * sizeof(float));
      ASSERT_EQ(prompt.layers[l].q.size(), kept * sizeof(float));
      EXPECT_LT(error(floats(prompt.layers[l].k), k.data() + l * kv, kv), kTolerance) << name << l;
      EXPECT_LT(error(floats(prompt.layers[l].v), v.data() + l * kv, kv), kTolerance) << name << l;
      EXPECT_LT(error(floats(prompt.layers[l].q), q.data() + (l + 1) * of_q - kept, kept),
                kTolerance)
          << name << l;
    }
    const auto hidden = golden_floats(name + "/hidden");
    const size_t width = prompt.hidden.size();
    EXPECT_LT(error(prompt.hidden.data(), hidden.data() + hidden.size() - width, width), kTolerance)
        << name;
  }
}

TEST(Transformer, LogitsOfEveryPrefixMatchTheGolden) {
  for (const std::string name : kModels) {
    Transformer model = load(name);
    const auto tokens = golden_tokens(name);
    const auto expected = golden_floats(name + "/logits");
    const size_t vocab = static_cast<size_t>(model.config().vocab_size);
    std::vector<float> logits(vocab);
    for (size_t n = 1; n <= tokens.size(); ++n) {
      const Prompt prompt = model.prefill(std::span(tokens).first(n), SIKV_FP32, 1);
      model.logits(prompt.hidden.data(), 1, logits.data());
      EXPECT_LT(error(logits.data(), expected.data() + (n - 1) * vocab, vocab), kTolerance)
          << name << ", " << n << " tokens";
    }
  }
}

TEST(Transformer, DecodeStepsMatchTheGolden) {
  for (const std::string name : kModels) {
    Transformer model = load(name);
    const auto tokens = golden_tokens(name);
    const auto expected = golden_floats(name + "/logits");
    const size_t vocab = static_cast<size_t>(model.config().vocab_size);
    const size_t first = 5;
    const Prompt prompt = model.prefill(std::span(tokens).first(first), SIKV_FP32, 5);
    Pipeline pipeline(parse_pipeline(kDense, registry()), registry(), cpu(3),
                      model.shape(SIKV_FP32, 64), 40);
    model.fill(pipeline, prompt);
    std::vector<float> logits(vocab);
    for (size_t i = first; i < tokens.size(); ++i) {
      const int64_t position = static_cast<int64_t>(i);
      model.step(pipeline, {&tokens[i], 1}, {&position, 1}, logits.data());
      EXPECT_LT(error(logits.data(), expected.data() + i * vocab, vocab), kTolerance)
          << name << ", position " << i;
    }
  }
}

// 1300 tokens go through the layers in two chunks and through the keys in three blocks; steps
// through the attention kernel know of neither. Tokens decoded in the tail stay fp32.
TEST(Transformer, PrefillOverChunksMatchesDecodeSteps) {
  Transformer model = load("qwen3");
  const size_t vocab = static_cast<size_t>(model.config().vocab_size);
  const auto tokens = random_tokens(1300, model.config().vocab_size);
  Pipeline pipeline(parse_pipeline(kDense, registry()), registry(), cpu(3),
                    model.shape(SIKV_FP32, 1400), 1200);
  model.fill(pipeline, model.prefill(std::span(tokens).first(200), SIKV_FP32, 5));
  std::vector<float> stepped(vocab), expected(vocab);
  for (size_t i = 200; i < tokens.size(); ++i) {
    const int64_t position = static_cast<int64_t>(i);
    model.step(pipeline, {&tokens[i], 1}, {&position, 1}, stepped.data());
  }
  model.logits(model.prefill(tokens, SIKV_FP32, 1).hidden.data(), 1, expected.data());
  EXPECT_LT(error(stepped.data(), expected.data(), vocab), 2e-5);
}

TEST(Transformer, ResultsDoNotDependOnThreads) {
  const auto tokens = random_tokens(600, 300);
  Transformer one = load("qwen2", 1), three = load("qwen2", 3);
  const Prompt a = one.prefill(tokens, SIKV_FP16, 16), b = three.prefill(tokens, SIKV_FP16, 16);
  EXPECT_EQ(a.hidden, b.hidden);
  for (size_t l = 0; l < a.layers.size(); ++l) EXPECT_EQ(a.layers[l].k, b.layers[l].k);
}

TEST(Transformer, SequencesOfABatchDoNotTouchEachOther) {
  Transformer model = load("llama");
  const size_t vocab = static_cast<size_t>(model.config().vocab_size);
  const int prompts[] = {3, 7};
  const auto tokens = random_tokens(20, model.config().vocab_size);
  std::vector<std::vector<float>> alone;
  std::vector<Prompt> kept;
  for (const int n : prompts) {
    kept.push_back(model.prefill(std::span(tokens).first(static_cast<size_t>(n)), SIKV_FP32, 3));
    Pipeline pipeline(parse_pipeline(kDense, registry()), registry(), cpu(3),
                      model.shape(SIKV_FP32, 64), 8);
    model.fill(pipeline, kept.back());
    const int64_t position = n;
    model.step(pipeline, {&tokens[10], 1}, {&position, 1}, alone.emplace_back(vocab).data());
  }
  Pipeline pipeline(parse_pipeline(kDense, registry()), registry(), cpu(3),
                    model.shape(SIKV_FP32, 64, 2), 8);
  for (int l = 0; l < model.config().num_layers; ++l) {
    const auto joined = [&](std::vector<std::byte> PromptLayer::*part) {
      std::vector<std::byte> all = kept[0].layers[static_cast<size_t>(l)].*part;
      const auto& second = kept[1].layers[static_cast<size_t>(l)].*part;
      all.insert(all.end(), second.begin(), second.end());
      return all;
    };
    const auto k = joined(&PromptLayer::k), v = joined(&PromptLayer::v),
               q = joined(&PromptLayer::q);
    const int32_t first[] = {0, 3}, count[] = {3, 7};
    const sikv_rows keys{k.data(), SIKV_FP32, 7, first, count, 64, 64};
    sikv_rows values = keys;
    values.data = v.data();
    pipeline.prefill(l, keys, values, q.data(), 3);
  }
  const int32_t next[] = {tokens[10], tokens[10]};
  const int64_t positions[] = {3, 7};
  std::vector<float> logits(2 * vocab);
  model.step(pipeline, next, positions, logits.data());
  EXPECT_LT(error(logits.data(), alone[0].data(), vocab), 1e-5);
  EXPECT_LT(error(logits.data() + vocab, alone[1].data(), vocab), 1e-5);
}

// Every sequence of a batch begins with the prompt it is filled with.
TEST(Transformer, OnePromptFillsABatch) {
  Transformer model = load("llama");
  const size_t vocab = static_cast<size_t>(model.config().vocab_size);
  const auto tokens = random_tokens(300, model.config().vocab_size);
  const Prompt prompt = model.prefill(tokens, SIKV_FP16, 16);
  const char* const sparse = "rot_lm+rot_lm > self_index(budget=32,pinned=8) > gather_attention";
  std::vector<float> alone(vocab), both(2 * vocab);
  for (const int batch : {1, 2}) {
    Pipeline pipeline(parse_pipeline(sparse, registry()), registry(), cpu(3),
                      model.shape(SIKV_FP16, 310, batch), 8);
    model.fill(pipeline, prompt);
    const std::vector<int32_t> next(static_cast<size_t>(batch), tokens[10]);
    const std::vector<int64_t> positions(static_cast<size_t>(batch), 300);
    model.step(pipeline, next, positions, batch == 1 ? alone.data() : both.data());
  }
  EXPECT_LT(error(both.data(), alone.data(), vocab), 1e-5);
  EXPECT_LT(error(both.data() + vocab, alone.data(), vocab), 1e-5);
}

TEST(Transformer, NamesTheNanOfAStep) {
  ModelFile file = read_model(tiny("qwen3"));
  auto* const wk = reinterpret_cast<float*>(file.layers[1].wk.data.data());
  const auto tokens = random_tokens(3, 300);
  Transformer good(read_model(tiny("qwen3")), cpu());
  const Prompt prompt = good.prefill(tokens, SIKV_FP32, 1);
  std::fill_n(wk, file.layers[1].wk.columns, std::numeric_limits<float>::max());
  Transformer model(std::move(file), cpu());
  Pipeline pipeline(parse_pipeline(kDense, registry()), registry(), cpu(),
                    model.shape(SIKV_FP32, 64), 8);
  model.fill(pipeline, prompt);
  std::vector<float> logits(300);
  const int64_t position = 3;
  const std::string said = refusal([&] {
    model.step(pipeline, {tokens.data(), 1}, {&position, 1}, logits.data());
  });
  EXPECT_NE(said.find("K of layer 1 holds a NaN or infinity"), std::string::npos) << said;
}

TEST(Transformer, RefusesWhatItCannotRun) {
  Transformer model = load("llama");
  EXPECT_EQ(refusal([&] { model.prefill(std::vector<int32_t>(), SIKV_FP16, 1); }),
            "the prompt is empty: give at least 1 token");
  const std::vector<int32_t> foreign = {5, 300};
  EXPECT_NE(refusal([&] { model.prefill(foreign, SIKV_FP16, 1); }).find("token 300"),
            std::string::npos);
  const std::vector<int32_t> negative = {-1};
  EXPECT_NE(refusal([&] { model.prefill(negative, SIKV_FP16, 1); }).find("token -1"),
            std::string::npos);
  const std::vector<int32_t> long_prompt(2049, 7);
  const std::string said = refusal([&] { model.prefill(long_prompt, SIKV_FP16, 1); });
  EXPECT_EQ(said,
            "the prompt has 2049 tokens, but tiny-llama is made for 2048: give a shorter prompt");
}

TEST(Transformer, NamesTheLayerThatBringsTheFirstNan) {
  ModelFile file = read_model(tiny("qwen3"));
  const float huge = std::numeric_limits<float>::max();
  auto* const gate = reinterpret_cast<float*>(file.layers[1].w_gate.data.data());
  std::fill_n(gate, file.layers[1].w_gate.columns, huge);
  Transformer model(std::move(file), cpu());
  const auto tokens = random_tokens(3, 300);
  const std::string said = refusal([&] { model.prefill(tokens, SIKV_FP32, 1); });
  EXPECT_NE(said.find("layer 1 of tiny-qwen3 gives a NaN or infinity at position 0"),
            std::string::npos)
      << said;
}

TEST(Transformer, NamesWhatTheCacheOrTheOutputCannotHold) {
  const auto tokens = random_tokens(3, 300);
  ModelFile loud = read_model(tiny("qwen3"));
  auto* const wv = reinterpret_cast<float*>(loud.layers[1].wv.data.data());
  for (int64_t i = 0; i < loud.layers[1].wv.columns; ++i) wv[i] *= 1e7f;
  Transformer model(std::move(loud), cpu());
  const std::string said = refusal([&] { model.prefill(tokens, SIKV_FP16, 1); });
  EXPECT_NE(said.find("V of layer 1 holds "), std::string::npos) << said;
  EXPECT_EQ(refusal([&] { model.prefill(tokens, SIKV_FP32, 1); }), "");

  ModelFile last = read_model(tiny("qwen3"));
  for (float& weight : last.norm) weight = std::numeric_limits<float>::max();
  Transformer blind(std::move(last), cpu());
  const Prompt prompt = blind.prefill(tokens, SIKV_FP32, 1);
  std::vector<float> logits(300);
  const std::string output = refusal([&] { blind.logits(prompt.hidden.data(), 1, logits.data()); });
  EXPECT_NE(output.find("the output layer of tiny-qwen3"), std::string::npos) << output;
}

}  // namespace
}  // namespace sikv
