// The life of a token: prompt to pages and tail, steps to the tail, a full tail to a page.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "framework/base/error.h"
#include "framework/config/pipeline_text.h"
#include "framework/metrics/attention_metrics.h"
#include "framework/pipeline/pipeline.h"
#include "tests/support/plugins.h"

namespace sikv {
namespace {

using testing::cpu;
using testing::registry;

constexpr int kHeads = 2, kGroup = 3, kDim = 64, kQueryHeads = kHeads * kGroup;

sikv_shape shape(int layers, int batch, int max_tokens) {
  return {sizeof(sikv_shape), layers, kQueryHeads, kHeads, kDim,
          SIKV_FP32,          batch,  max_tokens,  10000.0};
}

// Ragged prompts in one buffer, and what is appended later, per sequence [tokens, H, D].
class Batch {
 public:
  explicit Batch(std::vector<int> prompts, uint32_t seed = 1)
      : prompts_(std::move(prompts)), random_(seed) {
    for (int tokens : prompts_) {
      first_.push_back(static_cast<int32_t>(k_.size() / kRow));
      count_.push_back(tokens);
      append(k_, tokens * kRow);
      append(v_, tokens * kRow);
    }
    for (size_t b = 0; b < prompts_.size(); ++b) {
      const auto from = static_cast<int64_t>(first_[b]) * kRow,
                 to = from + int64_t{count_[b]} * kRow;
      sequence_k_.emplace_back(k_.begin() + from, k_.begin() + to);
      sequence_v_.emplace_back(v_.begin() + from, v_.begin() + to);
    }
  }

  int size() const { return static_cast<int>(prompts_.size()); }
  sikv_rows keys() const { return rows(k_); }
  sikv_rows values() const { return rows(v_); }
  std::vector<float> queries(int window) { return draw(size() * window * kQueryHeads * kDim); }

  void prefill(Pipeline& pipeline, int layer) {
    const int window = *std::min_element(prompts_.begin(), prompts_.end());
    const auto q = queries(window);
    pipeline.prefill(layer, keys(), values(), q.data(), window);
  }
  void append_token(Pipeline& pipeline, int layer) {
    const auto k = draw(size() * kRow), v = draw(size() * kRow);
    for (int b = 0; b < size(); ++b) {
      const auto at = int64_t{b} * kRow;
      auto& to_k = sequence_k_[static_cast<size_t>(b)];
      auto& to_v = sequence_v_[static_cast<size_t>(b)];
      to_k.insert(to_k.end(), k.begin() + at, k.begin() + at + kRow);
      to_v.insert(to_v.end(), v.begin() + at, v.begin() + at + kRow);
    }
    pipeline.append(layer, k.data(), v.data());
  }
  int length(int b) const {
    return static_cast<int>(sequence_k_[static_cast<size_t>(b)].size() / kRow);
  }

  // Largest relative error of out [B, Hq, D] against exact attention over everything.
  double worst_error(const std::vector<float>& q, const std::vector<float>& out) const {
    double worst = 0;
    for (int b = 0; b < size(); ++b) {
      for (int h = 0; h < kHeads; ++h) {
        std::vector<float> k, v;
        for (int t = 0; t < length(b); ++t) {
          const auto at = int64_t{t} * kRow + h * kDim;
          const auto& from_k = sequence_k_[static_cast<size_t>(b)];
          const auto& from_v = sequence_v_[static_cast<size_t>(b)];
          k.insert(k.end(), from_k.begin() + at, from_k.begin() + at + kDim);
          v.insert(v.end(), from_v.begin() + at, from_v.begin() + at + kDim);
        }
        const size_t first = static_cast<size_t>((b * kQueryHeads + h * kGroup) * kDim);
        const auto exact = exact_attention(q.data() + first, k.data(), v.data(), kGroup, kDim,
                                           length(b), 1.0 / std::sqrt(double{kDim}));
        worst =
            std::max(worst, relative_error({out.data() + first, size_t{kGroup} * kDim}, exact.out));
      }
    }
    return worst;
  }
  std::vector<float> draw(int n) {
    std::vector<float> values;
    append(values, n);
    return values;
  }

 private:
  static constexpr int kRow = kHeads * kDim;

  void append(std::vector<float>& to, int n) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < n; ++i) to.push_back(normal(random_));
  }
  sikv_rows rows(const std::vector<float>& data) const {
    return {data.data(),   SIKV_FP32,     *std::max_element(count_.begin(), count_.end()),
            first_.data(), count_.data(), kRow,
            kDim};
  }

  std::vector<int> prompts_;
  std::mt19937 random_;
  std::vector<float> k_, v_;
  std::vector<int32_t> first_, count_;
  std::vector<std::vector<float>> sequence_k_, sequence_v_;
};

// Runs `steps` steps and returns the worst error of the last one.
double run(const std::string& text, Batch& batch, int layers, int steps, int threads = 3,
           std::unique_ptr<Pipeline>* keep = nullptr) {
  const auto spec = parse_pipeline(text, registry());
  auto pipeline = std::make_unique<Pipeline>(spec, registry(), cpu(threads),
                                             shape(layers, batch.size(), 2000), steps);
  batch.prefill(*pipeline, 0);
  const size_t heads = static_cast<size_t>(batch.size() * kQueryHeads);
  std::vector<float> q, out(heads * kDim), lse(heads);
  for (int step = 0; step < steps; ++step) {
    pipeline->begin_step();
    batch.append_token(*pipeline, 0);
    q = batch.draw(batch.size() * kQueryHeads * kDim);
    pipeline->attend(0, q.data(), out.data(), lse.data());
  }
  const double error = batch.worst_error(q, out);
  if (keep != nullptr) *keep = std::move(pipeline);
  return error;
}

TEST(Life, EverythingSelectedInTheInputTypeIsExactAttention) {
  for (const char* text :
       {"fp16+fp16 > full > dense_attention", "fp16+fp16 > full > gather_attention",
        "fp16+fp16 > quest(budget=1000000) > gather_attention",
        "fp16+fp16 > oracle(budget=1000000,pinned=7) > gather_attention"}) {
    Batch batch({300, 1, 700, 256, 255}, 5);
    EXPECT_LT(run(text, batch, 1, 3), 2e-6) << text;
  }
}

TEST(Life, TheTailBecomesAPageWhenTheNextTokenArrives) {
  Batch batch({255, 3, 512});
  std::unique_ptr<Pipeline> pipeline;
  EXPECT_LT(run("fp16+fp16 > full > gather_attention", batch, 1, 1, 1, &pipeline), 2e-6);
  EXPECT_EQ(pipeline->cache().tail_len(0, 0), 256);  // full, and the newest token is exact
  EXPECT_EQ(pipeline->cache().encoded_len(0, 0), 0);
  EXPECT_EQ(pipeline->cache().encoded_len(0, 2 * kHeads), 512);

  pipeline->begin_step();
  batch.append_token(*pipeline, 0);
  EXPECT_EQ(pipeline->cache().tail_len(0, 0), 1);
  EXPECT_EQ(pipeline->cache().encoded_len(0, 0), 256);
  EXPECT_EQ(pipeline->cache().encoded_len(0, 1), 256);
  EXPECT_EQ(pipeline->cache().encoded_len(0, kHeads), 0);
}

TEST(Life, LongDecodeStaysExactOverManyPages) {
  Batch batch({100, 600});
  EXPECT_LT(run("fp16+fp16 > oracle(budget=100000,pinned=5) > gather_attention", batch, 1, 600),
            2e-6);
}

TEST(Life, KeepGeneratedLeavesGeneratedTokensInTheTail) {
  Batch batch({300});
  std::unique_ptr<Pipeline> pipeline;
  run("rot_lm+rot_lm > full(keep_generated=true) > gather_attention", batch, 1, 400, 1, &pipeline);
  EXPECT_EQ(pipeline->cache().encoded_len(0, 0), 256);
  EXPECT_EQ(pipeline->cache().tail_len(0, 0), 444);
}

TEST(Life, AnEvictingSelectorGivesPagesBack) {
  for (const char* codecs : {"fp16+fp16", "rot_lm+rot_lm", "sign_vq+intq"}) {
    Batch batch({2 * 256 + 3, 5 * 256});
    std::unique_ptr<Pipeline> pipeline;
    run(std::string(codecs) +
            " > streaming(budget=256,sinks=4,evict=true,pinned=0) > gather_attention",
        batch, 1, 300, 1, &pipeline);
    // 256 kept and at most the page that the tail became since.
    for (int row = 0; row < 2 * kHeads; ++row) {
      EXPECT_LE(pipeline->cache().encoded_len(0, row), 512) << codecs;
    }
    EXPECT_LE(pipeline->cache().pages_in_use(), 2 * 2 * kHeads) << codecs;
  }
}

TEST(Life, ResultsDoNotDependOnTheNumberOfThreads) {
  for (const char* text : {"rot_lm+rot_lm > self_index(budget=64,rerank=4) > sparse_flash",
                           "rot_lm+rot_lm > self_index(budget=32,rerank=4,schedule=auto,"
                           "refresh_cosine=0.4) > sparse_flash",
                           "rot_lm+rot_lm > self_index(budget=32,rerank=4,scan_every=4,"
                           "stagger=true) > sparse_flash",
                           "sign_vq+intq > self_index(budget=64,tables=6bit) > sparse_flash"}) {
    std::vector<std::vector<float>> outs;
    for (int threads : {1, 3}) {
      Batch batch({700, 900}, 9);
      const auto spec = parse_pipeline(text, registry());
      Pipeline pipeline(spec, registry(), cpu(threads), shape(1, 2, 2000), 8);
      batch.prefill(pipeline, 0);
      std::vector<float>& out = outs.emplace_back(size_t{2} * kQueryHeads * kDim);
      std::vector<float> lse(size_t{2} * kQueryHeads);
      for (int step = 0; step < 8; ++step) {
        pipeline.begin_step();
        batch.append_token(pipeline, 0);
        const auto q = batch.draw(2 * kQueryHeads * kDim);
        pipeline.attend(0, q.data(), out.data(), lse.data());
      }
    }
    EXPECT_EQ(outs[0], outs[1]) << text;
  }
}

TEST(Life, NaNInAStepNamesItsPlace) {
  Batch batch({300});
  const auto spec = parse_pipeline("fp16+fp16 > full > gather_attention", registry());
  Pipeline pipeline(spec, registry(), cpu(), shape(1, 1, 2000), 4);
  batch.prefill(pipeline, 0);
  pipeline.begin_step();
  auto k = batch.draw(kHeads * kDim);
  const auto v = batch.draw(kHeads * kDim);
  k[kDim + 7] = NAN;
  try {
    pipeline.append(0, k.data(), v.data());
    FAIL() << "expected an Error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "K of decode step 0 holds a NaN or infinity: layer 0, sequence 0, head 1, channel "
                 "7; check the model or the trace that it comes from");
  }
}

// Scores of larger numbers may be infinite, and the sum of such scores NaN.
TEST(Life, NumbersBeyondWhatACacheTakesNameTheirPlace) {
  for (const char* selector :
       {"self_index(budget=40)", "quest(budget=40)", "twilight(base=quest(budget=40))"}) {
    SCOPED_TRACE(selector);
    Batch batch({300});
    const auto spec = parse_pipeline(
        std::string("sign_vq+fp16 > ") + selector + " > gather_attention", registry());
    Pipeline pipeline(spec, registry(), cpu(), shape(1, 1, 2000), 4);
    batch.prefill(pipeline, 0);
    std::vector<float> out(size_t{kQueryHeads} * kDim), lse(kQueryHeads);
    const auto step_error = [&](float k0, float q0) -> std::string {
      auto k = batch.draw(kHeads * kDim), q = batch.draw(kQueryHeads * kDim);
      k[0] = k0;
      q[2 * kDim + 3] = q0;
      pipeline.begin_step();
      try {
        pipeline.append(0, k.data(), k.data());
        pipeline.attend(0, q.data(), out.data(), lse.data());
      } catch (const Error& error) {
        return error.what();
      }
      return "";
    };
    const std::string rest = "; check the model or the trace that it comes from";
    EXPECT_EQ(step_error(0x1p58f, -0x1p58f), "");
    EXPECT_EQ(step_error(1.0f, -1e38f),
              "q of decode step 1 holds -1e+38, and a cache takes numbers up to 2^58: layer "
              "0, sequence 0, head 2, channel 3" +
                  rest);
    EXPECT_EQ(step_error(1e20f, 1.0f),
              "K of decode step 2 holds 1e+20, and a cache takes numbers up to 2^58: layer "
              "0, sequence 0, head 0, channel 0" +
                  rest);
  }
}

TEST(Life, QueriesBeforeAPromptBeginsAreRefused) {
  const Batch batch({300, 20});
  Pipeline pipeline(parse_pipeline("fp16+fp16 > full > gather_attention", registry()), registry(),
                    cpu(), shape(1, 2, 1000), 4);
  const std::vector<float> q(2 * 21 * kQueryHeads * kDim);
  try {
    pipeline.prefill(0, batch.keys(), batch.values(), q.data(), 21);
    FAIL() << "expected an Error";
  } catch (const Error& error) {
    EXPECT_STREQ(
        error.what(),
        "the last 21 queries of every prompt are given, but sequence 1 has a prompt of 20: "
        "give at most as many as the shortest prompt has");
  }
  EXPECT_NO_THROW(pipeline.prefill(0, batch.keys(), batch.values(), q.data(), 20));
}

TEST(Life, PartsThatDoNotFitAreRefusedWhenThePipelineIsMade) {
  const auto refusal = [](const char* text) -> std::string {
    try {
      Pipeline(parse_pipeline(text, registry()), registry(), cpu(), shape(1, 1, 1000), 4);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refusal("fp16+fp16 > self_index(budget=64) > gather_attention")
                .find("selector self_index cannot read what key codec fp16 writes"),
            std::string::npos);
  EXPECT_NE(refusal("fp16+fp16 > random(budget=64) > dense_attention")
                .find("attends to every token, so selector random would have no effect"),
            std::string::npos);
  EXPECT_NE(refusal("rot_lm+rot_lm > full > dense_attention").find("gather_attention"),
            std::string::npos);
  // What an evicting base leaves is selected as a whole, also through wrappers that cut anew.
  EXPECT_EQ(refusal("fp16+fp16 > adakv(base=snapkv) > dense_attention"), "");
}

TEST(Life, ForcedVariantsRunOrFail) {
  auto spec = parse_pipeline("rot_lm+rot_lm > self_index(budget=64) > sparse_flash", registry());
  spec.force["selector"] = "ref";
  const Composition composition(spec, registry(), cpu(), shape(1, 1, 1000));
  EXPECT_EQ(composition.parts()[2].variant->variant, "ref");
  spec.force["selector.self_index"] = "cuda";
  EXPECT_THROW(Composition(spec, registry(), cpu(), shape(1, 1, 1000)), Error);
}

// The same numbers in another place: what is selected and what comes out is the same to the bit.
TEST(Life, LinesGiveWhatPlanesGive) {
  using Case = std::pair<const char*, std::string>;  // variant, options of self_index
  for (const auto& [variant, options] :
       {Case{"ref", ""}, Case{"cpu", ""}, Case{"ref", ",scan_every=3"},
        Case{"cpu", ",scan_every=3"}}) {
    std::vector<std::vector<float>> outs;
    std::vector<std::vector<int32_t>> selections;
    for (const std::string layout : {"planes", "lines"}) {
      PipelineSpec spec = parse_pipeline("rot_lm(layout=" + layout + ")+rot_lm(layout=" + layout +
                                             ") > self_index(budget=40,rerank=3,pinned=4" +
                                             options + ") > sparse_flash",
                                         registry());
      for (const char* role : {"keys", "values", "selector", "attention"}) {
        spec.force[role] = variant;
      }
      Batch batch({700, 300});
      Pipeline pipeline(spec, registry(), cpu(), shape(1, 2, 1024), 8);
      batch.prefill(pipeline, 0);
      std::vector<float> out(2 * kQueryHeads * kDim), lse(2 * kQueryHeads);
      for (int step = 0; step < 5; ++step) {
        pipeline.begin_step();
        batch.append_token(pipeline, 0);
        const auto q = batch.draw(2 * kQueryHeads * kDim);
        pipeline.attend(0, q.data(), out.data(), lse.data());
      }
      outs.push_back(out);
      selections.push_back(pipeline.selected(1));
    }
    EXPECT_EQ(outs[0], outs[1]) << variant << options;
    EXPECT_EQ(selections[0], selections[1]) << variant << options;
    EXPECT_EQ(selections[0].size(), 40u);
  }
}

TEST(Life, ValuesInLinesNeedKeysThatHaveThem) {
  const auto error_of = [](const std::string& text) -> std::string {
    try {
      Pipeline(parse_pipeline(text, registry()), registry(), cpu(), shape(1, 1, 512), 8);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(error_of("sign_vq+rot_lm(layout=lines) > self_index > sparse_flash"),
            "value codec rot_lm keeps bytes in the lines of the keys, but key codec sign_vq writes "
            "sign4(magnitude_bits=2,scale_group=32,scale=fp16).v1, which has no lines: give both "
            "codecs a layout with such lines, or neither");
  EXPECT_EQ(error_of("rot_lm(layout=lines)+intq > self_index > sparse_flash"), "");
  EXPECT_NE(error_of("rot_lm(layout=lines,bits=2)+rot_lm > self_index > sparse_flash")
                .find("rot_lm keys of 2 bits have no layout: lines, only those of 3 bits do: use "
                      "layout: planes"),
            std::string::npos);
}

}  // namespace
}  // namespace sikv
