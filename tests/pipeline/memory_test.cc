// The ledger tells the truth: its bytes are the layout's sizes and the process's own growth.
#include <gtest/gtest.h>

#include <fstream>
#include <random>

#include "framework/config/pipeline_text.h"
#include "framework/pipeline/pipeline.h"
#include "tests/support/plugins.h"

namespace sikv {
namespace {

uint64_t resident_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    uint64_t kib = 0;
    if (word == "VmRSS:" && status >> kib) return kib << 10;
  }
  return 0;
}

struct Case {
  const char* pipeline;
  int head_dim;
  double bytes_per_token;
};

TEST(Memory, BytesPerTokenAreTheLayouts) {
  const Case cases[] = {
      {"fp16+fp16 > full > gather_attention", 128, 512},
      {"sign_vq+intq > full > gather_attention", 128, 112},
      {"sign_vq+intq > full > gather_attention", 64, 56},
      {"sign_vq(scale_type=fp8_e4m3)+intq(scale_type=fp8_e4m3) > full > gather_attention", 128, 96},
      {"rot_lm+rot_lm > full > gather_attention", 128, 84},
      {"rot_lm+rot_lm > full > gather_attention", 64, 44},
      {"rot_lm(bits=2)+rot_lm > full > gather_attention", 128, 68},
      {"rot_lm(layout=lines)+rot_lm(layout=lines) > full > gather_attention", 128, 112},
      {"rot_lm(layout=lines)+rot_lm(layout=lines) > full > gather_attention", 64, 56},
      {"rot_lm(layout=lines)+intq > full > gather_attention", 128, 128},
      {"rot_lm(bits=4)+rot_lm(bits=3) > full > gather_attention", 128, 116},
  };
  for (const Case& c : cases) {
    const sikv_shape shape{sizeof(sikv_shape), 1, 4, 2, c.head_dim, SIKV_FP16, 1, 2048, 10000.0};
    Pipeline pipeline(parse_pipeline(c.pipeline, testing::registry()), testing::registry(),
                      testing::cpu(), shape, 8);
    std::vector<uint16_t> data(static_cast<size_t>(1100 * 2 * c.head_dim));
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (uint16_t& x : data) x = sikv_float_to_fp16(normal(random));
    const int32_t first = 0, count = 1100;
    const sikv_rows rows{data.data(), SIKV_FP16, count, &first, &count, 2 * c.head_dim, c.head_dim};
    std::vector<uint16_t> queries(static_cast<size_t>(4 * c.head_dim), sikv_float_to_fp16(0.5f));
    pipeline.prefill(0, rows, rows, queries.data(), 1);
    EXPECT_DOUBLE_EQ(pipeline.cache().bytes_per_token(), c.bytes_per_token) << c.pipeline;
    // What was planned is what is there.
    const Ledger planned =
        pipeline.composition().planned(1100, pipeline.composition().cache_options(8));
    for (const Ledger& ledger : {planned, pipeline.ledger()}) {
      for (const LedgerLine& line : ledger.lines()) {
        EXPECT_EQ(pipeline.ledger().bytes(line.role), planned.bytes(line.role))
            << c.pipeline << " " << line.role;
      }
    }
  }
}

TEST(Memory, TheProcessGrowsByWhatTheLedgerSays) {
  // 4 sequences of 32K tokens, 2 layers, 8 KV heads of 128: 1 GiB of fp16 pages.
  constexpr int kTokens = 32768, kHeads = 8, kDim = 128, kBatch = 4, kLayers = 2;
  std::vector<uint16_t> data(size_t{kTokens} * kHeads * kDim, sikv_float_to_fp16(0.25f));
  const std::vector<uint16_t> queries(size_t{kBatch} * kHeads * kDim, sikv_float_to_fp16(0.5f));
  const std::vector<int32_t> first(kBatch, 0), count(kBatch, kTokens);
  const sikv_rows rows{data.data(),  SIKV_FP16,     kTokens, first.data(),
                       count.data(), kHeads * kDim, kDim};
  const auto spec =
      parse_pipeline("fp16+fp16 > full(pinned=0) > dense_attention", testing::registry());
  testing::cpu(3);  // the workers' own memory is not the cache's

  const uint64_t before = resident_bytes();
  const sikv_shape shape{sizeof(sikv_shape), kLayers, kHeads,      kHeads, kDim,
                         SIKV_FP16,          kBatch,  kTokens + 8, 10000.0};
  Pipeline pipeline(spec, testing::registry(), testing::cpu(3), shape, 8);
  for (int l = 0; l < kLayers; ++l) pipeline.prefill(l, rows, rows, queries.data(), 1);
  const double growth = static_cast<double>(resident_bytes() - before);

  // The tail is reserved and counted but not touched by whole-page prompts.
  const Ledger ledger = pipeline.ledger();
  const double used = static_cast<double>(ledger.total() - ledger.bytes("tail"));
  EXPECT_GE(used, 1.0 * (1 << 30));
  EXPECT_NEAR(growth / used, 1.0, 0.03);
}

}  // namespace
}  // namespace sikv
