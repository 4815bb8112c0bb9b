#include "framework/model/evaluate.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "framework/config/pipeline_text.h"
#include "plugins/sdk/plugin.h"
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

// That they run: in a random model on random text no choice of 700 is better than chance. That what
// they get is right is the next test's.
TEST(Evaluation, SelectorsThatNeedAllQueriesOrOutputProjectionsRun) {
  Transformer model = load();
  Evaluation evaluation(model, random_text(1000, 4), SIKV_FP16, 64, true, registry(), cpu(3));
  const auto kl = [&](const char* selector) {
    return run(evaluation, fmt::format("fp16+fp16 > {} > sparse_flash", selector).c_str()).kl->mean;
  };
  for (const char* selector :
       {"h2o(budget=700,pinned=8)", "expected_attention(budget=700,pinned=8)",
        "criticalkv(base=snapkv(budget=700),pinned=8)", "laprox(budget=700,pinned=8)"}) {
    EXPECT_GT(kl(selector), 0) << selector;
  }
}

// What selectors that need both are given of a prompt, by layer.
struct Given {
  std::vector<std::vector<std::byte>> queries;
  std::vector<std::vector<float>> w_o;
};

Given& given() {
  static Given given;
  return given;
}

class Recorder final : public Selector {
 public:
  explicit Recorder(const CreateArgs& args) : shape_(args.shape) {}
  Plan plan() override { return {}; }
  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    const int64_t width = int64_t{shape_.num_query_heads} * shape_.head_dim;
    const auto* const q = static_cast<const std::byte*>(args.queries);
    given().queries.emplace_back(q, q + args.num_queries * width * sikv_dtype_bytes(view.dtype()));
    given().w_o.emplace_back(args.w_o, args.w_o + width * args.hidden);
  }
  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) SelectionRow(args.selection, row).select_all();
  }

 private:
  sikv_shape shape_;
};

std::unique_ptr<Selector> make_recorder(const CreateArgs& args) {
  return std::make_unique<Recorder>(args);
}

// The queries of every position in order, and each layer's own w_o, which transformer_test compares
// with the file.
TEST(Evaluation, QueriesAndOutputProjectionsAreThoseOfTheModel) {
  const sikv_plugin_entry entry =
      selector<make_recorder, kNoOptions, probe_ref,
               SIKV_SELECTOR_NEEDS_ALL_QUERIES | SIKV_SELECTOR_NEEDS_W_O>("ref");
  const sikv_plugin_tables_t tables = {sizeof tables, 1, &entry};
  Registry with_recorder;
  with_recorder.add_folder(SIKV_PLUGIN_FOLDER);
  with_recorder.add_linked(
      "linked/recorder",
      sdk::descriptor("recorder", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR), "", ""),
      &tables);
  Transformer model = load();
  const EvalText text = random_text(300, 1);
  Evaluation evaluation(model, text, SIKV_FP32, 64, true, with_recorder, cpu(3));
  given() = {};
  evaluation.run(parse_pipeline("fp16+fp16 > recorder > sparse_flash", with_recorder), cpu(3));
  const auto layers = static_cast<size_t>(model.config().num_layers);
  ASSERT_EQ(given().queries.size(), layers);
  for (size_t l = 0; l < layers; ++l) {
    EXPECT_EQ(given().w_o[l], model.output_projection(static_cast<int>(l)));
  }
  // Queries of a position do not depend on those behind it: each is the last of a shorter prompt.
  const size_t row = given().queries[0].size() / 300;
  for (const size_t position : {0u, 150u, 299u}) {
    const Prompt shorter = model.prefill(std::span(text.tokens).first(position + 1), SIKV_FP32, 1);
    for (size_t l = 0; l < layers; ++l) {
      const auto* const got =
          reinterpret_cast<const float*>(given().queries[l].data() + position * row);
      const auto* const want = reinterpret_cast<const float*>(shorter.layers[l].q.data());
      ASSERT_EQ(shorter.layers[l].q.size(), row);
      for (size_t i = 0; i < row / sizeof(float); ++i) {
        ASSERT_NEAR(got[i], want[i], 1e-4 * (1 + std::abs(want[i])))
            << "layer " << l << ", position " << position;
      }
    }
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
