// Every compiled SIMD target of simd_scan.h and simd_select.h against scalar code, bit for bit.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/common/simd_scan_test.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "kernels/common/simd_scan.h"
#include "kernels/common/simd_select.h"

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

void CallScanScores(const IndexPages& pages, int64_t tokens, int head_dim, const uint8_t* tables,
                    uint16_t* scores, uint32_t* histogram) {
  ScanScores(pages, tokens, head_dim, tables, scores, histogram);
}
int64_t CallScanSelect(const IndexPages& pages, int64_t tokens, int head_dim, const uint8_t* tables,
                       Excluded excluded, int64_t budget, void* scratch, int32_t* positions) {
  return ScanSelect(pages, tokens, head_dim, tables, excluded, budget, scratch, positions);
}
void CallScanExact(const IndexPages& pages, int64_t tokens, int head_dim, const float* tables,
                   float* scores) {
  ScanExact(pages, tokens, head_dim, tables, scores);
}
int64_t CallCountingSelect(const uint16_t* scores, int64_t tokens, uint32_t* histogram, int bins,
                           Excluded excluded, int64_t budget, int32_t* positions) {
  return CountingSelect(scores, tokens, histogram, bins, excluded, budget, positions);
}
int64_t CallSelectFloat(const float* scores, int64_t tokens, Excluded excluded, int64_t budget,
                        void* scratch, int32_t* positions) {
  return SelectFloat(scores, tokens, excluded, budget, scratch, positions);
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace sikv {

HWY_EXPORT(CallScanScores);
HWY_EXPORT(CallScanSelect);
HWY_EXPORT(CallScanExact);
HWY_EXPORT(CallCountingSelect);
HWY_EXPORT(CallSelectFloat);

namespace {

constexpr int kHeadDims[] = {64, 96, 128, 256};
constexpr int64_t kSizes[] = {1,   2,   3,   7,   8,   15,  31,   33,       63,   127,
                              129, 255, 256, 257, 511, 512, 1023, 4096 + 7, 20011};

// 64-byte aligned bytes with a border on both sides that must survive, and a dirty start.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes), buffer_(bytes + 3 * kBorder, 0xA5) {
    const auto at = reinterpret_cast<uintptr_t>(buffer_.data()) + kBorder;
    begin_ = reinterpret_cast<uint8_t*>((at + 63) / 64 * 64);
  }
  template <class T>
  T* As() {
    return reinterpret_cast<T*>(begin_);
  }
  template <class T>
  bool Holds(const std::vector<T>& expected) const {
    return bytes_ == expected.size() * sizeof(T) &&
           (bytes_ == 0 || memcmp(expected.data(), begin_, bytes_) == 0);
  }
  bool Intact() const {
    for (const uint8_t* b = buffer_.data(); b < begin_; ++b) {
      if (*b != 0xA5) return false;
    }
    for (const uint8_t* b = begin_ + bytes_; b < buffer_.data() + buffer_.size(); ++b) {
      if (*b != 0xA5) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kBorder = 256;
  size_t bytes_;
  std::vector<uint8_t> buffer_;
  uint8_t* begin_;
};

// Pages in shuffled order with other planes between them; codes behind the last token are random.
struct Codes {
  Codes(int64_t tokens, int head_dim, std::mt19937& rng) : tokens(tokens), head_dim(head_dim) {
    const int64_t num_pages = (tokens + kScanPageTokens - 1) / kScanPageTokens;
    page_bytes = kScanPageTokens * head_dim / 8;
    stride = page_bytes + 64 * (rng() % 3);
    buffer = std::make_unique<Guarded>(static_cast<size_t>(stride * num_pages));
    for (int64_t i = 0; i < stride * num_pages; ++i) buffer->As<uint8_t>()[i] = rng() & 255;
    table.resize(num_pages);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), rng);
  }
  IndexPages pages() const { return {buffer->As<uint8_t>(), stride, table.data()}; }
  uint8_t* Word(int64_t t, int g) const {
    const int64_t in_page = t % kScanPageTokens;
    return buffer->As<uint8_t>() + table[t / kScanPageTokens] * stride + in_page / 8 * head_dim +
           4 * g;
  }
  int Nibble(int64_t t, int g) const {
    const int shift = 4 * static_cast<int>(t % 8);
    return Word(t, g)[shift / 8] >> (shift % 8) & 15;
  }

  int64_t tokens;
  int head_dim;
  int64_t page_bytes;
  int64_t stride;
  std::unique_ptr<Guarded> buffer;
  std::vector<int32_t> table;
};

template <class T, class Sum>
std::vector<Sum> ReferenceScan(const Codes& codes, const std::vector<T>& tables) {
  std::vector<Sum> scores(codes.tokens);
  for (int64_t t = 0; t < codes.tokens; ++t) {
    Sum sum = tables[codes.Nibble(t, 0)];
    for (int g = 1; g < codes.head_dim / 4; ++g) sum += tables[16 * g + codes.Nibble(t, g)];
    scores[t] = sum;
  }
  return scores;
}

template <class T>
std::vector<int32_t> ReferenceSelect(const std::vector<T>& scores,
                                     const std::vector<int32_t>& excluded, int64_t budget) {
  std::vector<int32_t> order;
  for (int32_t t = 0; t < static_cast<int32_t>(scores.size()); ++t) {
    if (!std::binary_search(excluded.begin(), excluded.end(), t)) order.push_back(t);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  order.resize(std::min<size_t>(order.size(), budget < 0 ? 0 : budget));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<int32_t> SomeExcluded(int64_t tokens, int kind, std::mt19937& rng) {
  std::vector<int32_t> all(tokens);
  std::iota(all.begin(), all.end(), 0);
  if (kind == 0) return {};
  if (kind == 1) std::shuffle(all.begin(), all.end(), rng);  // scattered; kind 2: a prefix
  const int64_t count = kind == 3 ? tokens : std::min<int64_t>(tokens, 1 + rng() % 64);
  all.resize(count);
  std::sort(all.begin(), all.end());
  return all;
}

std::vector<int64_t> Budgets(int64_t tokens, size_t excluded, std::mt19937& rng) {
  const int64_t left = tokens - static_cast<int64_t>(excluded);
  std::vector<int64_t> budgets = {0, 1, 2, left - 1, left, left + 1, tokens, tokens + 1};
  for (int i = 0; i < 3; ++i) budgets.push_back(1 + rng() % tokens);
  budgets.push_back(1 + tokens / 13);
  budgets.erase(std::remove_if(budgets.begin(), budgets.end(), [](int64_t b) { return b < 0; }),
                budgets.end());
  return budgets;
}

class SimdScan : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
  std::mt19937 rng_{7};
};

TEST_P(SimdScan, ScoresAndSelectsWithQuantisedTables) {
  for (int head_dim : kHeadDims) {
    for (int64_t tokens : kSizes) {
      for (int kind = 0; kind < 5; ++kind) {
        SCOPED_TRACE("D " + std::to_string(head_dim) + ", tokens " + std::to_string(tokens) +
                     ", kind " + std::to_string(kind));
        Codes codes(tokens, head_dim, rng_);
        std::vector<uint8_t> tables(head_dim / 4 * 16);
        // Random; full scale; few distinct scores; constant zero; scores that rise with position.
        for (auto& entry : tables) {
          entry = kind == 0 ? rng_() % 64 : kind == 1 ? 63 : kind == 2 ? rng_() % 2 : 0;
        }
        if (kind == 4) {
          for (int c = 0; c < 16; ++c) tables[c] = 3 * c;
          for (int64_t t = 0; t < tokens; ++t) {
            uint8_t* byte = codes.Word(t, 0) + t % 8 / 2;
            const int level = static_cast<int>(16 * t / tokens);
            *byte = t % 2 ? (*byte & 15) | level << 4 : (*byte & 240) | level;
          }
        }
        const auto expected = ReferenceScan<uint8_t, uint16_t>(codes, tables);
        std::vector<uint32_t> expected_histogram(ScoreBins(head_dim));
        for (uint16_t s : expected) ++expected_histogram[s];

        Guarded scores(2 * tokens);
        Guarded histogram(4 * expected_histogram.size());
        HWY_DYNAMIC_DISPATCH(CallScanScores)
        (codes.pages(), tokens, head_dim, tables.data(), scores.As<uint16_t>(),
         histogram.As<uint32_t>());
        ASSERT_TRUE(scores.Intact() && histogram.Intact());
        ASSERT_TRUE(scores.Holds(expected));
        ASSERT_TRUE(histogram.Holds(expected_histogram));

        const auto excluded = SomeExcluded(tokens, rng_() % 4, rng_);
        const Excluded list = {excluded.data(), static_cast<int64_t>(excluded.size())};
        for (int64_t budget : Budgets(tokens, excluded.size(), rng_)) {
          SCOPED_TRACE("budget " + std::to_string(budget) + ", excluded " +
                       std::to_string(excluded.size()));
          const auto want = ReferenceSelect(expected, excluded, budget);
          std::vector<uint32_t> counts = expected_histogram;
          Guarded counted(4 * want.size());
          ASSERT_EQ(static_cast<int64_t>(want.size()),
                    HWY_DYNAMIC_DISPATCH(CallCountingSelect)(scores.As<uint16_t>(), tokens,
                                                             counts.data(), ScoreBins(head_dim),
                                                             list, budget, counted.As<int32_t>()));
          ASSERT_TRUE(counted.Intact());
          ASSERT_TRUE(counted.Holds(want));

          Guarded scratch(RunningSelectBytes(budget));
          Guarded fused(4 * want.size());
          ASSERT_EQ(static_cast<int64_t>(want.size()),
                    HWY_DYNAMIC_DISPATCH(CallScanSelect)(codes.pages(), tokens, head_dim,
                                                         tables.data(), list, budget,
                                                         scratch.As<void>(), fused.As<int32_t>()));
          ASSERT_TRUE(fused.Intact() && scratch.Intact());
          ASSERT_TRUE(fused.Holds(want));
        }
      }
    }
  }
}

// Long enough that a sample of pages sets the threshold it starts at. What a sample sees may be
// right, or nearly all of what is best.
TEST_P(SimdScan, SelectsFromLongContexts) {
  constexpr int64_t kTokens = 300 * kScanPageTokens + 77;
  constexpr int kDim = 64;
  for (bool misleads : {false, true}) {
    Codes codes(kTokens, kDim, rng_);
    std::vector<uint8_t> tables(kDim / 4 * 16);
    for (auto& entry : tables) entry = misleads ? 0 : rng_() % 64;
    if (misleads) {
      // Group 0 alone: high in every page of the sample, low in the others but for one token each.
      for (int c = 0; c < 16; ++c) tables[c] = 4 * c;
      for (int64_t t = 0; t < kTokens; ++t) {
        const int64_t page = t / kScanPageTokens;
        bool sampled = false;
        for (int64_t i = 0; i < 32; ++i) sampled = sampled || page == (2 * i + 1) * 300 / 64;
        const int level = sampled || t % kScanPageTokens == 100 ? 15 : 3;
        uint8_t* byte = codes.Word(t, 0) + t % 8 / 2;
        *byte = t % 2 ? (*byte & 15) | level << 4 : (*byte & 240) | level;
      }
    }
    const auto scores = ReferenceScan<uint8_t, uint16_t>(codes, tables);
    for (int64_t budget : {1, 100, 2048, 8000, 9000, 40000}) {
      const auto want = ReferenceSelect(scores, {}, budget);
      Guarded scratch(RunningSelectBytes(budget));
      Guarded got(4 * want.size());
      ASSERT_EQ(budget, HWY_DYNAMIC_DISPATCH(CallScanSelect)(
                            codes.pages(), kTokens, kDim, tables.data(), Excluded(), budget,
                            scratch.As<void>(), got.As<int32_t>()));
      ASSERT_TRUE(got.Intact() && scratch.Intact());
      ASSERT_TRUE(got.Holds(want)) << "budget " << budget << (misleads ? ", misleading" : "");
    }
  }
}

TEST_P(SimdScan, ScoresWithExactTables) {
  for (int head_dim : kHeadDims) {
    for (int64_t tokens : kSizes) {
      Codes codes(tokens, head_dim, rng_);
      std::vector<float> tables(head_dim / 4 * 16);
      std::normal_distribution<float> normal(0.0f, 3.0f);
      for (auto& entry : tables) entry = normal(rng_);
      const auto expected = ReferenceScan<float, float>(codes, tables);
      Guarded scores(4 * tokens);
      HWY_DYNAMIC_DISPATCH(CallScanExact)
      (codes.pages(), tokens, head_dim, tables.data(), scores.As<float>());
      ASSERT_TRUE(scores.Intact());
      ASSERT_TRUE(scores.Holds(expected)) << "D " << head_dim << ", tokens " << tokens;
    }
  }
}

TEST_P(SimdScan, SelectsFloats) {
  const float inf = std::numeric_limits<float>::infinity();
  for (int64_t tokens : kSizes) {
    for (int kind = 0; kind < 9; ++kind) {
      std::vector<float> scores(tokens);
      std::normal_distribution<float> normal(kind == 1 ? 1000.0f : 0.0f, 1.0f);
      for (int64_t t = 0; t < tokens; ++t) {
        const float x = normal(rng_);
        switch (kind) {
          case 0:
          case 1:
            scores[t] = x;
            break;  // all signs; one sign
          case 2:
            scores[t] = std::round(2 * x);
            break;  // ties, both zeros
          case 3:
            scores[t] = rng_() % 2 ? 0.0f : -0.0f;
            break;  // one tie
          case 4:
            scores[t] = rng_() % 3 ? -inf : x;
            break;  // masked tokens
          case 5:
            scores[t] = -inf;
            break;
          case 6:
            scores[t] = static_cast<float>(t) * 0.37f - 11;
            break;  // every token a candidate
          case 7:
            scores[t] = -static_cast<float>(t);
            break;
          case 8:
            scores[t] = rng_() % 5 ? 1e-42f * (rng_() % 100) : inf;
            break;  // denormals
        }
      }
      const auto excluded = SomeExcluded(tokens, rng_() % 4, rng_);
      const Excluded list = {excluded.data(), static_cast<int64_t>(excluded.size())};
      for (int64_t budget : Budgets(tokens, excluded.size(), rng_)) {
        const auto want = ReferenceSelect(scores, excluded, budget);
        Guarded scratch(SelectFloatBytes(budget));
        Guarded got(4 * want.size());
        ASSERT_EQ(static_cast<int64_t>(want.size()),
                  HWY_DYNAMIC_DISPATCH(CallSelectFloat)(scores.data(), tokens, list, budget,
                                                        scratch.As<void>(), got.As<int32_t>()));
        ASSERT_TRUE(got.Intact() && scratch.Intact());
        ASSERT_TRUE(got.Holds(want)) << "tokens " << tokens << ", kind " << kind << ", budget "
                                     << budget << ", excluded " << excluded.size();
      }
    }
  }
}

std::vector<int64_t> Targets() {
  std::vector<int64_t> targets;
  for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    targets.push_back(left & -left);
  }
  return targets;
}

INSTANTIATE_TEST_SUITE_P(Targets, SimdScan, testing::ValuesIn(Targets()),
                         [](const auto& info) { return std::string(hwy::TargetName(info.param)); });

}  // namespace
}  // namespace sikv

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

#endif  // HWY_ONCE
