#include <gtest/gtest.h>

#include <cmath>

#include "framework/base/error.h"
#include "tests/support/evictions.h"

namespace sikv::testing {
namespace {

constexpr int kGroup = 3, kWindow = 4;  // as many queries as a session observes

const CacheSpec kSpec{
    .num_kv_heads = 2, .head_dim = 64, .encoded = {512, 256}, .tail = {2, 90}, .pinned = 9};

FilledCache make_cache() {
  const sikv_shape shape = tight_shape(kSpec, kGroup);
  return FilledCache(kSpec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
}

Choices options(const char* budget, const char* kernel, const char* pooling) {
  return {{"budget", budget}, {"window", "4"}, {"kernel_size", kernel}, {"pooling", pooling}};
}

// The definition in fp64, without the plugin's code.
std::vector<double> scores(const FilledCache& filled, int row, int kernel, bool max) {
  const sikv_cache_view& view = filled.cache.view();
  const int b = row / view.num_kv_heads, h = row % view.num_kv_heads, dim = view.head_dim;
  const int prompt = filled.k.count(b);
  const std::vector<uint8_t> q = gaussian_queries(kSpec, kGroup, kWindow, 100);
  std::vector<double> sum(static_cast<size_t>(prompt - kWindow), 0.0);
  for (int i = 0; i < kWindow; ++i) {
    for (int g = 0; g < kGroup; ++g) {
      const int64_t head = ((int64_t{b} * kWindow + i) * view.num_kv_heads + h) * kGroup + g;
      std::vector<double> e;
      double total = 0.0;
      for (int t = 0; t <= prompt - kWindow + i; ++t) {
        double dot = 0.0;
        for (int d = 0; d < dim; ++d) {
          dot += double{sikv_load(q.data(), view.dtype, head * dim + d)} * filled.k.at(b, t, h, d);
        }
        e.push_back(std::exp(dot / std::sqrt(dim)));
        total += e.back();
      }
      for (size_t t = 0; t < sum.size(); ++t) sum[t] += e[t] / total / (kWindow * kGroup);
    }
  }
  std::vector<double> pooled;
  for (int t = 0; t < std::ssize(sum); ++t) {
    double pool = 0.0;
    for (int at = std::max(t - kernel / 2, 0);
         at <= std::min<int>(t + kernel / 2, static_cast<int>(sum.size()) - 1); ++at) {
      const double score = sum[static_cast<size_t>(at)];
      pool = max ? std::max(pool, score) : pool + score / kernel;
    }
    pooled.push_back(pool);
  }
  return pooled;
}

TEST(SnapKvTest, KeepsTheWindowAndTheBestOfTheRest) {
  const FilledCache filled = make_cache();
  for (const auto& [kernel, pooling] : {std::pair{"1", "mean"}, {"5", "mean"}, {"7", "max"}}) {
    const auto kept = kept_after_prompt(find_variant(SIKV_SELECTOR, "snapkv", "ref"),
                                        options("60", kernel, pooling), filled, kGroup);
    for (int row = 0; row < filled.cache.num_rows(); ++row) {
      SCOPED_TRACE(std::string(kernel) + " " + pooling + ", row " + std::to_string(row));
      const Slots& list = kept[static_cast<size_t>(row)];
      const std::vector<double> want =
          scores(filled, row, std::atoi(kernel), std::string(pooling) == "max");
      Slots open = candidates(filled.cache, row);
      // The last 2 of the first prompt's window lie in pages, none of the second's.
      const auto window = static_cast<int32_t>(want.size());
      for (int32_t slot = window; slot < filled.cache.view().encoded_len[row]; ++slot) {
        EXPECT_TRUE(std::binary_search(list.begin(), list.end(), slot) ||
                    !std::binary_search(open.begin(), open.end(), slot));
      }
      EXPECT_EQ(list.size(), 60u);
      // Nothing left out beats what was kept by more than rounding.
      double worst = 1.0, best = 0.0;
      for (const int32_t slot : open) {
        if (slot >= window) continue;
        const double score = want[static_cast<size_t>(slot)];
        if (std::binary_search(list.begin(), list.end(), slot)) {
          worst = std::min(worst, score);
        } else {
          best = std::max(best, score);
        }
      }
      EXPECT_LE(best, worst * (1 + 1e-5));
    }
  }
}

TEST(SnapKvTest, AllocatesExactlyTheBudgetOrKeepsTheWindow) {
  const FilledCache filled = make_cache();
  for (const char* variant : {"ref", "cpu"}) {
    for (const int budget : {0, 1, 2, 3, 100, 255, 503, 600}) {
      const auto kept =
          kept_after_prompt(find_variant(SIKV_SELECTOR, "snapkv", variant),
                            options(std::to_string(budget).c_str(), "7", "max"), filled, kGroup);
      for (int row = 0; row < filled.cache.num_rows(); ++row) {
        const size_t open = candidates(filled.cache, row).size();
        size_t in_window = 0;
        for (const int32_t slot : candidates(filled.cache, row)) in_window += slot >= 510 ? 1 : 0;
        EXPECT_EQ(kept[static_cast<size_t>(row)].size(),
                  std::min(open, std::max(in_window, static_cast<size_t>(budget))))
            << variant << " " << budget;
      }
    }
  }
}

TEST(SnapKvTest, CpuKeepsWhatRefKeeps) {
  const FilledCache filled = make_cache();
  const Choices choices = options("80", "7", "max");
  expect_equal_but_for_the_cut(
      kept_after_prompt(find_variant(SIKV_SELECTOR, "snapkv", "cpu"), choices, filled, kGroup),
      kept_after_prompt(find_variant(SIKV_SELECTOR, "snapkv", "ref"), choices, filled, kGroup));
}

TEST(SnapKvTest, RefusesKernelsWithoutAMiddle) {
  try {
    make_selector(find_variant(SIKV_SELECTOR, "snapkv"), {{"kernel_size", "6"}},
                  tight_shape(kSpec, kGroup), cpu());
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(
        std::string(error.what()).find("kernel_size is 6, which has no middle: give an odd number"),
        std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace sikv::testing
