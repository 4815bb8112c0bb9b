#include <gtest/gtest.h>

#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

const Variant& quest() { return find_variant(SIKV_SELECTOR, "quest"); }

FilledCache make_cache(const CacheSpec& spec, const char* key_codec = "fp16",
                       Pattern pattern = Pattern::kGaussian) {
  const sikv_shape shape = tight_shape(spec, 1);
  return FilledCache(spec, make_codec(SIKV_KEY_CODEC, key_codec, {}, shape),
                     make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape), pattern);
}

std::vector<float> mean_query(const sikv_cache_view& view, int row, int group,
                              const std::vector<uint8_t>& q) {
  std::vector<float> mean(static_cast<size_t>(view.head_dim), 0.0f);
  for (int d = 0; d < view.head_dim; ++d) {
    float& to = mean[static_cast<size_t>(d)];
    for (int g = 0; g < group; ++g) {
      to += sikv_load(q.data(), view.dtype, (int64_t{row} * group + g) * view.head_dim + d);
    }
    to /= static_cast<float>(group);
  }
  return mean;
}

float page_score(const FilledCache& filled, int row, const std::vector<float>& query, int first,
                 int page_tokens) {
  const sikv_cache_view& view = filled.cache.view();
  const int b = row / view.num_kv_heads, h = row % view.num_kv_heads;
  const int end = std::min(first + page_tokens, view.encoded_len[row]);
  float score = 0.0f;
  for (int d = 0; d < view.head_dim; ++d) {
    const float of_query = query[static_cast<size_t>(d)];
    float low = filled.k.at(b, first, h, d), high = low;
    for (int t = first; t < end; ++t) {
      low = std::min(low, filled.k.at(b, t, h, d));
      high = std::max(high, filled.k.at(b, t, h, d));
    }
    score += std::max(of_query * low, of_query * high);
  }
  return score;
}

// The protocol, page by page: whole pages by descending score, pinned tokens skipped and not
// counted, cut at the budget.
Slots best_pages(const FilledCache& filled, int row, int group, const std::vector<uint8_t>& q,
                 int page_tokens, size_t budget) {
  const sikv_cache_view& view = filled.cache.view();
  const int encoded = view.encoded_len[row];
  const std::vector<float> query = mean_query(view, row, group, q);
  std::vector<std::pair<float, int>> pages;  // (-score, first slot)
  for (int first = 0; first < encoded; first += page_tokens) {
    pages.emplace_back(-page_score(filled, row, query, first, page_tokens), first);
  }
  std::sort(pages.begin(), pages.end());
  const Slots open = candidates(filled.cache, row);
  Slots slots;
  for (const auto& [score, first] : pages) {
    for (int32_t slot = first; slot < first + page_tokens && slots.size() < budget; ++slot) {
      if (std::binary_search(open.begin(), open.end(), slot)) slots.push_back(slot);
    }
  }
  std::sort(slots.begin(), slots.end());
  return slots;
}

// 70 tokens end in a page of 6; 25 and 50 end inside a page. Keys are the exact ones on any codec.
TEST(QuestTest, TakesWholePagesByTheirUpperBound) {
  for (const int32_t dtype : {SIKV_FP16, SIKV_BF16, SIKV_FP32}) {
    const CacheSpec spec{
        .num_kv_heads = 2, .dtype = dtype, .encoded = {300, 70}, .tail = {9, 0}, .pinned = 12};
    const std::vector<uint8_t> q = gaussian_queries(spec, 3, 1, 5);
    for (const char* codec : {"fp16", "kivi"}) {
      const FilledCache filled = make_cache(spec, codec);
      for (const int page_tokens : {8, 16, 64}) {
        for (const int budget : {1, 25, 32, 50}) {
          SelectorSession session(
              quest(),
              {{"budget", std::to_string(budget)}, {"page_tokens", std::to_string(page_tokens)}},
              filled, 3);
          session.observe_everything();
          const std::vector<Slots> rows = session.select(0, q);
          for (int row = 0; row < filled.cache.num_rows(); ++row) {
            EXPECT_EQ(rows[static_cast<size_t>(row)],
                      best_pages(filled, row, 3, q, page_tokens, static_cast<size_t>(budget)))
                << codec << " row " << row << " page_tokens " << page_tokens << " budget "
                << budget;
          }
        }
      }
    }
  }
}

// Of the score that the test above holds the plugin to: no member of a page exceeds it.
TEST(QuestTest, APagesScoreBoundsEveryMember) {
  constexpr int kGroup = 3, kPage = 16;
  const CacheSpec spec{.num_kv_heads = 2, .encoded = {300, 70}, .tail = {9, 0}};
  const std::vector<uint8_t> q = gaussian_queries(spec, kGroup, 1, 5);
  for (const Pattern pattern : {Pattern::kGaussian, Pattern::kOutliers}) {
    const FilledCache filled = make_cache(spec, "fp16", pattern);
    const sikv_cache_view& view = filled.cache.view();
    for (int head = 0; head < filled.cache.num_rows() * kGroup; ++head) {
      const int row = head / kGroup, b = row / view.num_kv_heads, h = row % view.num_kv_heads;
      const std::vector<float> query = mean_query(view, head, 1, q);
      for (int t = 0; t < view.encoded_len[row]; ++t) {
        double dot = 0.0, size = 0.0;
        for (int d = 0; d < view.head_dim; ++d) {
          const double product = double{query[static_cast<size_t>(d)]} * filled.k.at(b, t, h, d);
          dot += product;
          size += std::abs(product);
        }
        const float score = page_score(filled, row, query, t / kPage * kPage, kPage);
        EXPECT_GE(score, dot - 1e-5 * size)  // fp32 sums
            << pattern_name(pattern) << " query head " << head << " token " << t;
      }
    }
  }
}

TEST(QuestTest, TakesTheLowerOfEqualPages) {
  const FilledCache filled =
      make_cache({.num_kv_heads = 1, .encoded = {100}, .pinned = 5}, "fp16", Pattern::kConstant);
  SelectorSession session(quest(), {{"budget", "40"}}, filled, 1);
  session.observe_everything();
  Slots lowest = candidates(filled.cache, 0);
  lowest.resize(40);
  EXPECT_EQ(session.select(0)[0], lowest);
}

// Two rows of the input type per page of encoded tokens.
TEST(QuestTest, CountsItsSummaries) {
  const FilledCache filled =
      make_cache({.num_kv_heads = 2, .dtype = SIKV_BF16, .encoded = {300, 70}, .tail = {9, 40}});
  SelectorSession session(quest(), {}, filled, 1);
  session.observe_everything();
  EXPECT_EQ(session.selector().state_bytes(), 2u * (19 + 5) * 2 * 64 * 2);
  session.selector().begin_sequence(0);
  EXPECT_EQ(session.selector().state_bytes(), 2u * 5 * 2 * 64 * 2);
}

// All of a row's summaries, at every step.
TEST(QuestTest, CountsWhatItReads) {
  const FilledCache filled = make_cache({.num_kv_heads = 2, .encoded = {300, 70}, .tail = {9, 40}});
  SelectorSession session(quest(), {{"budget", "40"}}, filled, 1);
  session.observe_everything();
  for (int step = 0; step < 3; ++step) session.select(step);
  std::map<std::string, double> counters;
  for (const sikv_counter& c : session.selector().counters()) counters[c.name] = c.value;
  EXPECT_EQ(counters, (std::map<std::string, double>{
                          {"runs", 3 * 4}, {"scan_bytes", 3 * 2 * (19 + 5) * 2 * 64 * 2}}));
}

}  // namespace
}  // namespace sikv::testing
