// What a GPU pins, beside what the CPU pins: every rule, input type and alignment, and ties.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "framework/pipeline/pin.h"
#include "plugins/layouts/dtype_name.h"
#include "tests/support/device_call.h"
#include "tests/support/guarded.h"
#include "tests/support/plugins.h"
#include "tests/support/queries.h"
#include "tests/support/test_rows.h"

namespace sikv::testing {
namespace {

using Slots = std::vector<int32_t>;

constexpr int kHeads = 2, kGroup = 3, kQueryHeads = kHeads * kGroup, kDim = 64, kWindow = 32;
constexpr int kPinned = 24;
constexpr float kScale = 0.125f;
constexpr int32_t kInputTypes[] = {SIKV_FP32, SIKV_FP16, SIKV_BF16};
constexpr PinRule kRules[] = {PinRule::kLastQuery, PinRule::kSnapKv, PinRule::kFirst};

// Ragged prompts of one layer and their newest queries. Keys begin `shift` elements after an address
// that 16 divides; rows are whole 16 bytes apart.
class Prompts {
 public:
  Prompts(int32_t dtype, Pattern pattern, int shift = 0) {
    const std::vector<int> counts = {40, 255, 256, 700, 1500};
    TestRows keys(counts, kHeads, kDim, dtype);
    keys.fill(pattern, 21);
    keys_ = keys.all();
    const auto offset = static_cast<size_t>(shift * sikv_dtype_bytes(dtype));
    bytes_.resize(offset + keys_.data_bytes);
    std::memcpy(bytes_.data() + offset, keys_.rows.data, keys_.data_bytes);
    keys_.rows.data = bytes_.data() + offset;
    queries_ = gaussian_queries(
        {.num_kv_heads = kHeads, .head_dim = kDim, .dtype = dtype, .encoded = counts}, kGroup,
        kWindow, 22);
  }
  Prompts(const Prompts&) = delete;
  Prompts& operator=(const Prompts&) = delete;

  int num_rows() const { return static_cast<int>(keys_.count.size()) * kHeads; }
  // Tokens of a row that compete, unless for snapkv.
  int whole_tokens(int row) const {
    return keys_.count[static_cast<size_t>(row / kHeads)] / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
  }

  // The pins of all rows.
  std::vector<Slots> on_cpu(PinRule rule) const {
    const size_t sequence_bytes = queries_.size() / keys_.count.size();
    std::vector<Slots> pins;
    for (int row = 0; row < num_rows(); ++row) {
      const int b = row / kHeads;
      pins.push_back(choose_pinned(rule, kPinned,
                                   {keys_.rows, b, row % kHeads, whole_tokens(row),
                                    queries_.data() + static_cast<size_t>(b) * sequence_bytes,
                                    kWindow, kQueryHeads, kHeads, kDim, kScale}));
    }
    return pins;
  }
  std::vector<Slots> on_gpu(PinRule rule) const {
    const auto rows = static_cast<size_t>(num_rows());
    Guarded<int32_t> slots(rows * kPinned), len(rows);
    DeviceCall call(gpu());
    choose_pinned_on_gpu(rule, kPinned,
                         {call.rows(keys_), call.in(queries_), kWindow, kQueryHeads, kHeads, kDim,
                          num_rows() / kHeads, kScale, call.out(slots), call.out(len)},
                         gpu());
    call.finish();
    EXPECT_TRUE(slots.intact() && len.intact()) << "written outside of the pins";
    std::vector<Slots> pins;
    for (size_t row = 0; row < rows; ++row) {
      const int32_t count = std::clamp(len[row], 0, kPinned);
      EXPECT_EQ(len[row], count) << "row " << row;
      const int32_t* const first = slots.data() + row * kPinned;
      pins.emplace_back(first, first + count);
    }
    return pins;
  }

 private:
  std::vector<uint8_t> bytes_, queries_;
  RowsPart keys_;
};

class CudaPin : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!gpu_missing().empty()) GTEST_SKIP() << gpu_missing();
  }
};

// One element further and no key can be read 16 bytes at a time.
TEST_F(CudaPin, PinsInASmallCacheWhatTheCpuPins) {
  for (const int32_t dtype : kInputTypes) {
    for (const int shift : {0, 1}) {
      SCOPED_TRACE(std::string(dtype_name(dtype)) + ", shift " + std::to_string(shift));
      const Prompts prompts(dtype, Pattern::kGaussian, shift);
      for (const PinRule rule : kRules) {
        SCOPED_TRACE("rule " + std::to_string(static_cast<int>(rule)));
        EXPECT_EQ(prompts.on_gpu(rule), prompts.on_cpu(rule));
      }
    }
  }
}

// All scores are one.
TEST_F(CudaPin, OfEqualKeysTheLowestSlotsArePinned) {
  for (const int32_t dtype : kInputTypes) {
    for (const Pattern pattern : {Pattern::kConstant, Pattern::kZeros}) {
      SCOPED_TRACE(std::string(dtype_name(dtype)) + ", " + std::string(pattern_name(pattern)));
      const Prompts prompts(dtype, pattern);
      std::vector<Slots> lowest;
      for (int row = 0; row < prompts.num_rows(); ++row) {
        Slots& slots = lowest.emplace_back(std::min(kPinned, prompts.whole_tokens(row)));
        std::iota(slots.begin(), slots.end(), 0);
      }
      for (const PinRule rule : kRules) {
        SCOPED_TRACE("rule " + std::to_string(static_cast<int>(rule)));
        EXPECT_EQ(prompts.on_gpu(rule), lowest);
      }
    }
  }
}

// Keys that come again every 33 tokens: the cut lies among equals, with larger scores between them.
TEST_F(CudaPin, OfEqualsAtTheCutTheLowerOnesArePinned) {
  for (const int32_t dtype : kInputTypes) {
    SCOPED_TRACE(std::string(dtype_name(dtype)));
    const Prompts prompts(dtype, Pattern::kSteps);
    EXPECT_EQ(prompts.on_gpu(PinRule::kLastQuery), prompts.on_cpu(PinRule::kLastQuery));
  }
}

}  // namespace
}  // namespace sikv::testing
