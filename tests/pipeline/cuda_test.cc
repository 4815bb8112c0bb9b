// Whole pipelines on a GPU: beside the CPU's, recorded beside eager, and what goes wrong.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "framework/base/error.h"
#include "framework/config/pipeline_text.h"
#include "framework/device/cuda_device.h"
#include "framework/pipeline/pipeline.h"
#include "tests/support/plugins.h"

namespace sikv {
namespace {

using testing::cpu;
using testing::gpu;
using testing::gpu_missing;
using testing::registry;

constexpr int kHeads = 2, kGroup = 3, kDim = 64, kQueryHeads = kHeads * kGroup, kWindow = 32;
constexpr int kMaxTokens = 2000;
const std::vector<int> kPrompts = {300, 33, 700, 256, 255};

sikv_shape shape(int layers, int batch, int max_tokens = kMaxTokens) {
  return {sizeof(sikv_shape), layers, kQueryHeads, kHeads, kDim,
          SIKV_FP16,          batch,  max_tokens,  10000.0};
}

// fp16 numbers, the same for the same seed.
class Numbers {
 public:
  explicit Numbers(uint32_t seed) : random_(seed) {}
  std::vector<uint16_t> draw(int64_t n) {
    std::vector<uint16_t> values(static_cast<size_t>(n));
    for (uint16_t& value : values) value = sikv_float_to_fp16(normal_(random_));
    return values;
  }

 private:
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
};

// Ragged prompts of one layer.
struct Prompts {
  std::vector<int32_t> first, count;
  std::vector<uint16_t> k, v, q;
  int window = kWindow;

  Prompts(const std::vector<int>& lengths, uint32_t seed) {
    int32_t tokens = 0;
    for (const int length : lengths) {
      first.push_back(tokens);
      count.push_back(length);
      tokens += length;
      window = std::min(window, length);
    }
    Numbers numbers(seed);
    k = numbers.draw(int64_t{tokens} * kHeads * kDim);
    v = numbers.draw(int64_t{tokens} * kHeads * kDim);
    q = numbers.draw(std::ssize(lengths) * window * kQueryHeads * kDim);
  }
  sikv_rows rows(const std::vector<uint16_t>& data) const {
    return {data.data(),  SIKV_FP16,    *std::max_element(count.begin(), count.end()),
            first.data(), count.data(), kHeads * kDim,
            kDim};
  }
  void fill(Pipeline& pipeline, int layer) const {
    pipeline.prefill(layer, rows(k), rows(v), q.data(), window);
  }
};

// k, v, q of one step of B sequences.
struct Token {
  std::vector<uint16_t> k, v, q;

  Token(int batch, uint32_t seed) {
    Numbers numbers(seed);
    k = numbers.draw(int64_t{batch} * kHeads * kDim);
    v = numbers.draw(int64_t{batch} * kHeads * kDim);
    q = numbers.draw(int64_t{batch} * kQueryHeads * kDim);
  }
};

double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    norm += double{b[i]} * b[i];
  }
  return std::sqrt(difference / norm);
}

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!gpu_missing().empty()) GTEST_SKIP() << gpu_missing();
  }

  static std::unique_ptr<Pipeline> on_gpu(const std::string& text, const sikv_shape& shape,
                                          int steps) {
    const PipelineSpec spec = parse_pipeline(text, registry());
    return std::make_unique<Pipeline>(spec, registry(), gpu(), shape, steps);
  }
  static std::string error_of(const std::function<void()>& body) {
    try {
      body();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }
};

constexpr const char* kPipelines[] = {
    "fp16+fp16 > full(pinned=0) > dense_attention",
    "fp16+fp16 > quest(budget=64) > gather_attention",
    "fp16+fp16 > random(budget=64) > gather_attention",
    "kivi+kivi > full > gather_attention",
    "rot_lm+rot_lm > streaming(budget=64,pin=first,pinned=16) > sparse_flash",
    "rot_lm+rot_lm > self_index(budget=64,tables=6bit) > sparse_flash",
    "rot_lm+rot_lm > self_index(budget=64,tables=6bit,rerank=4) > sparse_flash",
    "rot_lm+rot_lm > self_index(budget=64,tables=6bit,rerank=4,scan_every=4,stagger=true) > "
    "sparse_flash",
    "rot_lm+rot_lm > "
    "self_index(budget=64,tables=6bit,rerank=4,schedule=auto,tolerance=0.05,window=12) > "
    "sparse_flash",
    "rot_lm(layout=lines)+rot_lm(layout=lines) > self_index(budget=64,tables=6bit,rerank=4) > "
    "sparse_flash",
    "rot_lm(layout=lines)+rot_lm(layout=lines) > "
    "self_index(budget=64,tables=6bit,rerank=4,scan_every=8,refresh_cosine=0.5) > sparse_flash",
    "rot_lm(layout=lines)+rot_lm(layout=lines) > "
    "streaming(budget=256,sinks=4,evict=true,pinned=0) > sparse_flash",
    "sign_vq+intq > self_index(budget=64,tables=6bit,pin=snapkv) > sparse_flash",
    "rot_lm+rot_lm > streaming(budget=256,sinks=4,evict=true,pinned=0) > gather_attention",
    "sign_vq+intq > streaming(budget=300,sinks=4,evict=true,pinned=7) > gather_attention",
};

class CudaPipeline : public Cuda, public ::testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    Cuda::SetUp();
    if (IsSkipped()) return;
    try {
      const PipelineSpec spec = parse_pipeline(GetParam(), registry());
      static_cast<void>(Composition(spec, registry(), gpu(), shape(1, 1)));
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }

  void expect_as_on_cpu(const std::vector<int>& lengths, int steps);
};

void CudaPipeline::expect_as_on_cpu(const std::vector<int>& lengths, int steps) {
  const int batch = static_cast<int>(lengths.size());
  const auto fast = on_gpu(GetParam(), shape(1, batch), steps);
  Pipeline truth(parse_pipeline(GetParam(), registry()), registry(), cpu(3), shape(1, batch),
                 steps);
  const Prompts prompts(lengths, 1);
  prompts.fill(*fast, 0);
  prompts.fill(truth, 0);
  std::vector<float> out(static_cast<size_t>(batch * kQueryHeads * kDim)), exact(out);
  std::vector<float> lse(static_cast<size_t>(batch * kQueryHeads)), exact_lse(lse);
  int other_selections = 0;
  for (int step = 0; step < steps; ++step) {
    const Token token(batch, 100 + static_cast<uint32_t>(step));
    for (Pipeline* pipeline : {fast.get(), &truth}) {
      pipeline->begin_step();
      pipeline->append(0, token.k.data(), token.v.data());
    }
    fast->attend(0, token.q.data(), out.data(), lse.data());
    truth.attend(0, token.q.data(), exact.data(), exact_lse.data());
    for (int row = 0; row < batch * kHeads; ++row) {
      ASSERT_EQ(fast->cache().encoded_len(0, row), truth.cache().encoded_len(0, row));
      other_selections += fast->selected(row) != truth.selected(row);
    }
    ASSERT_LT(relative_error(out, exact), 3e-3) << "step " << step;
    ASSERT_LT(relative_error(lse, exact_lse), 1e-3) << "step " << step;
  }
  EXPECT_EQ(other_selections, 0) << "of " << steps * batch * kHeads;
  EXPECT_EQ(fast->cache().pages_in_use(), truth.cache().pages_in_use());
  EXPECT_EQ(fast->cache().bytes_per_token(), truth.cache().bytes_per_token());
}

// 600 steps: every sequence gets two or three pages of generated tokens.
TEST_P(CudaPipeline, DecodesAsTheCpu) { expect_as_on_cpu(kPrompts, 600); }

// Few steps, for compute-sanitizer (scripts/test gpu): the sixth fills a page of the second sequence,
// the first one is long enough to be evicted from and to choose periods for.
TEST_P(CudaPipeline, DecodesASmallCacheAsTheCpu) { expect_as_on_cpu({700, 250}, 8); }

// Recorded steps give the bits of eager ones, over flushes and ragged lengths, and leave the same
// counts on host and device.
TEST_P(CudaPipeline, RecordedStepsEqualEagerOnes) {
  const int batch = static_cast<int>(kPrompts.size()), steps = 600, num_layers = 2;
  const size_t B = kPrompts.size();
  Device& device = gpu();
  struct Side {
    std::unique_ptr<Pipeline> pipeline;
    std::vector<DeviceBuffer> buffers;
    std::vector<Pipeline::LayerStep> layers;
  };
  const size_t kv_bytes = B * kHeads * kDim * 2, q_bytes = B * kQueryHeads * kDim * 2;
  const size_t out_bytes = B * kQueryHeads * kDim * 4, lse_bytes = B * kQueryHeads * 4;
  Side sides[2];
  for (Side& side : sides) {
    side.pipeline = on_gpu(GetParam(), shape(num_layers, batch), steps);
    for (int l = 0; l < num_layers; ++l) {
      Prompts(kPrompts, 10 + static_cast<uint32_t>(l)).fill(*side.pipeline, l);
      for (const size_t bytes : {kv_bytes, kv_bytes, q_bytes, out_bytes, lse_bytes}) {
        side.buffers.emplace_back(device, bytes);
      }
      const DeviceBuffer* own = side.buffers.data() + 5 * l;
      side.layers.push_back(
          {own[0].as<>(), own[1].as<>(), own[2].as<>(), own[3].as<float>(), own[4].as<float>()});
    }
  }
  std::vector<float> out[2], lse[2];
  for (int step = 0; step < steps; ++step) {
    for (int i = 0; i < 2; ++i) {
      Side& side = sides[i];
      for (int l = 0; l < num_layers; ++l) {
        const Token token(batch, 1000 + static_cast<uint32_t>(2 * step + l));
        const DeviceBuffer* own = side.buffers.data() + 5 * l;
        device.copy_in(own[0].as<>(), token.k.data(), kv_bytes);
        device.copy_in(own[1].as<>(), token.v.data(), kv_bytes);
        device.copy_in(own[2].as<>(), token.q.data(), q_bytes);
      }
      side.pipeline->step(side.layers,
                          i == 0 ? Pipeline::StepMode::kEager : Pipeline::StepMode::kRecorded);
      side.pipeline->synchronize();
      out[i].resize(out_bytes / 4 * num_layers);
      lse[i].resize(lse_bytes / 4 * num_layers);
      for (int l = 0; l < num_layers; ++l) {
        const DeviceBuffer* own = side.buffers.data() + 5 * l;
        device.copy_out(out[i].data() + l * out_bytes / 4, own[3].as<>(), out_bytes);
        device.copy_out(lse[i].data() + l * lse_bytes / 4, own[4].as<>(), lse_bytes);
      }
    }
    ASSERT_EQ(std::memcmp(out[0].data(), out[1].data(), out[0].size() * 4), 0) << "step " << step;
    ASSERT_EQ(std::memcmp(lse[0].data(), lse[1].data(), lse[0].size() * 4), 0) << "step " << step;
  }
  for (const Side& side : sides) {
    for (int l = 0; l < num_layers; ++l) {
      const sikv_cache_view there = side.pipeline->cache().view(l);
      const sikv_cache_view here = side.pipeline->cache().host_view(l);
      std::vector<int32_t> encoded(B * kHeads), tail(B);
      device.copy_out(encoded.data(), there.encoded_len, encoded.size() * 4);
      device.copy_out(tail.data(), there.tail_len, tail.size() * 4);
      EXPECT_TRUE(std::equal(encoded.begin(), encoded.end(), here.encoded_len));
      EXPECT_TRUE(std::equal(tail.begin(), tail.end(), here.tail_len));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, CudaPipeline, ::testing::ValuesIn(kPipelines), [](const auto& info) {
  std::string name = info.param;
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
  return name;
});

TEST_F(Cuda, NaNNamesItsPlace) {
  const auto attempt = [](int where) {
    const auto pipeline = on_gpu("fp16+fp16 > full(pinned=0) > dense_attention", shape(2, 2), 4);
    Prompts prompts({300, 40}, 1);
    if (where == 0) prompts.k[size_t{(300 + 7) * kHeads + 1} * kDim + 5] = 0x7e00;
    return error_of([&] {
      for (int l = 0; l < 2; ++l) prompts.fill(*pipeline, l);
      Token token(2, 3);
      if (where == 1) token.v[kHeads * kDim + kDim + 9] = 0x7c00;
      if (where == 2) token.q[(kQueryHeads + 4) * kDim + 2] = 0x7e00;
      std::vector<float> out(size_t{2} * kQueryHeads * kDim), lse(size_t{2} * kQueryHeads);
      pipeline->begin_step();
      for (int l = 0; l < 2; ++l) {
        const Token fine(2, 3);
        const Token& own = l == 0 ? fine : token;
        pipeline->append(l, own.k.data(), own.v.data());
        pipeline->attend(l, own.q.data(), out.data(), lse.data());
      }
    });
  };
  const std::string rest =
      ": a cache takes finite numbers up to 2^58; check the model or the trace that it comes from";
  EXPECT_EQ(attempt(0), "K is nan at layer 0, sequence 1, KV head 1, position 7, channel 5" + rest);
  EXPECT_EQ(attempt(1),
            "V is inf at layer 1, sequence 1, KV head 1, position 40, channel 9" + rest);
  const std::string q = attempt(2);
  EXPECT_TRUE(q.starts_with("q is nan at layer 1, sequence 1, query head 4, position ")) << q;
}

TEST_F(Cuda, ACacheThatDoesNotFitNamesTheLargestBatchThatDoes) {
  const std::string error = error_of(
      [] { on_gpu("fp16+fp16 > full(pinned=0) > dense_attention", shape(32, 4096, 1 << 20), 4); });
  EXPECT_NE(error.find("the cache needs "), std::string::npos) << error;
  EXPECT_NE(error.find("the largest batch that fits is "), std::string::npos) << error;
}

TEST_F(Cuda, AnAllocationThatFailsSaysWhatWasFree) {
  const std::string error = error_of([] { gpu().allocate(size_t{1} << 46); });
  EXPECT_TRUE(error.starts_with("cannot allocate 64.00 TiB on ")) << error;
  EXPECT_NE(error.find(" are free; lower the batch"), std::string::npos) << error;
  // and nothing is lost
  gpu().synchronize();
  EXPECT_NO_THROW(DeviceBuffer(gpu(), 1 << 20));
}

TEST_F(Cuda, AnOrdinalThatDoesNotExistIsRefused) {
  const std::string error = error_of([] { open_cuda_device(99); });
  EXPECT_TRUE(error.starts_with("device cuda: there is no GPU 99: this host has ")) << error;
}

}  // namespace
}  // namespace sikv
