// The ledger tells the truth: its bytes are the layout's sizes and the process's own growth.
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <random>
#include <string>

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

// Layers of 8 KV heads of 128 over a batch of 4 x 32K tokens, 512 MiB of fp16 pages each, and what of
// the prompts fills no page.
struct LargeBatch {
  static constexpr int kHeads = 8, kDim = 128, kBatch = 4, kEncoded = 32768, kHidden = 16;

  LargeBatch(const char* pipeline, int layers, int tail)
      : text(pipeline), num_layers(layers), tokens(kEncoded + tail) {}

  // Bytes that the process grows by while the pipeline is made, takes its prompts and then `steps`
  // steps.
  double growth(int steps = 0) {
    device.trim();  // of what earlier tests left
    const uint64_t before = resident_bytes();
    const sikv_shape shape{sizeof(sikv_shape), num_layers, kHeads,     kHeads, kDim,
                           SIKV_FP16,          kBatch,     tokens + 8, 10000.0};
    pipeline = std::make_unique<Pipeline>(parse_pipeline(text, testing::registry()),
                                          testing::registry(), device, shape, 8);
    const std::vector<int32_t> first(kBatch, 0), count(kBatch, tokens);
    const sikv_rows rows{data.data(),  SIKV_FP16,     tokens, first.data(),
                         count.data(), kHeads * kDim, kDim};
    for (int l = 0; l < num_layers; ++l) {
      pipeline->prefill(l, rows, rows, queries.data(), 1, {w_o.data(), kHidden});
    }
    std::vector<float> out(queries.size()), lse(queries.size() / kDim);
    for (int step = 0; step < steps; ++step) {
      pipeline->begin_step();
      for (int l = 0; l < num_layers; ++l) {
        pipeline->append(l, data.data(), data.data());
        pipeline->attend(l, queries.data(), out.data(), lse.data());
      }
    }
    return static_cast<double>(resident_bytes() - before);
  }

  const char* text;
  int num_layers, tokens;
  Device& device = testing::cpu(3);  // its workers' own memory is not the cache's
  std::vector<uint16_t> data =
      std::vector<uint16_t>(static_cast<size_t>(tokens) * kHeads * kDim, sikv_float_to_fp16(0.25f));
  std::vector<uint16_t> queries =
      std::vector<uint16_t>(size_t{kBatch} * kHeads * kDim, sikv_float_to_fp16(0.5f));
  std::vector<float> w_o = std::vector<float>(size_t{kHeads} * kDim * kHidden, 0.1f);
  std::unique_ptr<Pipeline> pipeline;
};

TEST(Memory, TheProcessGrowsByWhatTheLedgerSays) {
  LargeBatch batch("fp16+fp16 > full(pinned=0) > dense_attention", 2, 0);
  const double growth = batch.growth();
  // The tail is reserved and counted but not touched by prompts of whole pages.
  const Ledger ledger = batch.pipeline->ledger();
  const double used = static_cast<double>(ledger.total() - ledger.bytes("tail"));
  EXPECT_GE(used, 1.0 * (1 << 30));
  EXPECT_NEAR(growth / used, 1.0, 0.03);
}

// One process each: the allocator keeps, by what it freed before, some MiB of scores that are freed
// with what they ranked.
struct Evicting {
  const char* text;
  int layers, most_mib;
};
class EvictingMemory : public ::testing::TestWithParam<Evicting> {};

// After prompts and three steps, the second of which fills a page.
TEST_P(EvictingMemory, WhatIsEvictedLeavesTheProcess) {
  LargeBatch batch(GetParam().text, GetParam().layers, 255);
  const double growth = batch.growth(3);
  const double total = static_cast<double>(batch.pipeline->ledger().total());
  std::printf("grown by %.0f MiB, %.0f in the ledger\n", growth / (1 << 20), total / (1 << 20));
  EXPECT_LE(total, GetParam().most_mib * 1.0 * (1 << 20));
  EXPECT_NEAR(growth / total, 1.0, 0.05);
}

INSTANTIATE_TEST_SUITE_P(
    Selectors, EvictingMemory,
    ::testing::Values(
        Evicting{"fp16+fp16 > snapkv(budget=4096,pinned=0) > sparse_flash", 6, 470},
        Evicting{"fp16+fp16 > streaming(budget=4096,evict=true,pinned=0) > sparse_flash", 6, 450},
        Evicting{"fp16+fp16 > tova(budget=4096,pinned=0) > sparse_flash", 6, 470},
        Evicting{"fp16+fp16 > laprox(budget=4096,pinned=0) > sparse_flash", 6, 470},
        Evicting{"rot_lm+rot_lm > snapkv(budget=24576,pinned=0) > sparse_flash", 10, 750}),
    [](const auto& info) { return std::to_string(info.index); });

}  // namespace
}  // namespace sikv
