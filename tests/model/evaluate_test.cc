#include "framework/model/evaluate.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "framework/config/pipeline_text.h"
#include "tests/support/plugins.h"

namespace sikv {
namespace {

using testing::cpu;
using testing::registry;

EvalText random_text(int64_t prompt, int64_t steps) {
  Random random(1);
  EvalText text{"random", {}, prompt, steps};
  for (int64_t i = 0; i < prompt + steps + 1; ++i) {
    text.tokens.push_back(static_cast<int32_t>(random.below(300)));
  }
  return text;
}

Transformer load() {
  return Transformer(read_model(std::string(SIKV_SOURCE_DIR) + "/datasets/tiny/qwen3.h5"), cpu(3));
}

Evaluated run(Evaluation& evaluation, const char* pipeline) {
  return evaluation.run(parse_pipeline(pipeline, registry()), cpu(3));
}

TEST(Evaluation, DenseNllIsThatOfPrefills) {
  Transformer model = load();
  const EvalText text = random_text(600, 5);
  Evaluation evaluation(model, text, SIKV_FP32, 64, false, registry(), cpu(3));
  std::vector<float> logits(300);
  double nll = 0;
  for (size_t step = 0; step < 5; ++step) {
    const Prompt prompt = model.prefill(std::span(text.tokens).first(601 + step), SIKV_FP32, 1);
    model.logits(prompt.hidden.data(), 1, logits.data());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(double{logit});
    nll += std::log(sum) - logits[static_cast<size_t>(text.tokens[601 + step])];
  }
  // Encoded pages hold fp16.
  EXPECT_NEAR(evaluation.dense().nll, nll / 5, 1e-3);
  EXPECT_EQ(evaluation.dense().pipeline, Evaluation::dense_pipeline(registry()));
  EXPECT_FALSE(evaluation.dense().kl.has_value());
}

TEST(Evaluation, EverythingSelectedIsDense) {
  Transformer model = load();
  Evaluation evaluation(model, random_text(600, 6), SIKV_FP16, 64, false, registry(), cpu(3));
  const Evaluated same = run(evaluation, "fp16+fp16 > full(pinned=0) > dense_attention");
  EXPECT_EQ(same.nll_added, 0);
  EXPECT_EQ(same.kl->mean, 0);
  EXPECT_EQ(same.top1_same, 1);
  const Evaluated pinned = run(evaluation, "fp16+fp16 > full(pinned=8) > gather_attention");
  EXPECT_LT(pinned.kl->p99, 1e-6);
  EXPECT_NEAR(pinned.nll_added, 0, 1e-4);
  EXPECT_EQ(pinned.bytes_per_token, 256);
  EXPECT_FALSE(pinned.scans_per_step.has_value());
  // All of 601 to 606 tokens, 256 bytes each, whether encoded, pinned or in the tail.
  EXPECT_EQ(pinned.attended_bytes, 256 * 603.5);
  EXPECT_EQ(pinned.scan_bytes, 0);
}

TEST(Evaluation, CompressionCostsAndScansAreCounted) {
  Transformer model = load();
  Evaluation evaluation(model, random_text(1000, 8), SIKV_FP16, 64, false, registry(), cpu(3));
  const Evaluated coarse =
      run(evaluation, "rot_lm(bits=2)+rot_lm(bits=2) > full(pinned=8) > gather_attention");
  const Evaluated fine =
      run(evaluation, "rot_lm(bits=4)+rot_lm(bits=4) > full(pinned=8) > gather_attention");
  EXPECT_GT(coarse.kl->mean, 0);
  EXPECT_GT(coarse.kl->mean, fine.kl->mean);
  const Evaluated every = run(
      evaluation,
      "rot_lm+rot_lm > self_index(budget=32,rerank=2,scan_every=4,pinned=8) > gather_attention");
  EXPECT_EQ(every.scans_per_step, 0.25);
  EXPECT_EQ(every.budget, 32);
  // 8 pinned and a tail of 233 to 240 tokens are exact.
  EXPECT_NEAR(every.attended_bytes.value(), 32 * every.bytes_per_token + (8 + 236.5) * 256, 1e-6);
  EXPECT_GT(every.scan_bytes.value(), 0);
  EXPECT_EQ(every.variants.size(), 4u);
}

TEST(Evaluation, SelectorsThatNeedAllQueriesOrOutputProjectionsGetThem) {
  Transformer model = load();
  Evaluation evaluation(model, random_text(1000, 4), SIKV_FP16, 64, true, registry(), cpu(3));
  const auto kl = [&](const char* selector) {
    return run(evaluation, fmt::format("fp16+fp16 > {} > sparse_flash", selector).c_str()).kl->mean;
  };
  for (const char* selector :
       {"h2o(budget=700,pinned=8)", "expected_attention(budget=700,pinned=8)",
        "criticalkv(base=snapkv(budget=700),pinned=8)", "laprox(budget=700,pinned=8)"}) {
    EXPECT_GT(kl(selector), 0) << selector;
    EXPECT_LT(kl(selector), kl("random(budget=100,pinned=8)")) << selector;
  }
}

TEST(Evaluation, TheContextIsTheLimit) {
  Transformer model = load();
  try {
    Evaluation(model, random_text(2040, 9), SIKV_FP16, 64, false, registry(), cpu(3));
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("2040 tokens and 9 steps do not fit the context"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace sikv
