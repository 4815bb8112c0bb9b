#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iomanip>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <sstream>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "framework/cache/ledger.h"
#include "plugins/layouts/nibble_tile.h"
#include "plugins/layouts/rlm4_v1.h"
#include "plugins/layouts/rotation.h"
#include "plugins/sdk/view.h"
#include "selectors/self_index/self_index_tables.h"
#include "tests/support/counters.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

using Slots = std::vector<int32_t>;

std::vector<float> gaussian(size_t n, uint64_t seed) {
  Random random(seed);
  std::vector<float> out(n);
  for (float& x : out) x = static_cast<float>(random.normal());
  return out;
}

struct Keys {
  const char* codec;
  Choices choices;
};
const Keys kRotLm{"rot_lm", {}};
const Keys kSignVq{"sign_vq", {}};
const Keys kExactKeys{"sign_vq", {{"magnitude_bits", "16"}, {"center", "none"}}};

// A filled cache and one selector on it.
class Bench {
 public:
  Bench(const CacheSpec& spec, const Keys& keys, int group, int threads = 1)
      : group_(group),
        shape_(make_shape(spec.head_dim, spec.dtype, spec.num_kv_heads, group)),
        threads_(threads),
        filled_(spec, make_codec(SIKV_KEY_CODEC, keys.codec, keys.choices, shape_),
                make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape_)) {
    // Room for what tests use: workspaces grow with it.
    shape_.num_layers = 4;
    shape_.max_tokens = 4096;
  }

  // Writes one key before encode_again().
  void set_key(int row, int token, const std::vector<float>& key) {
    const int b = row / view().num_kv_heads, h = row % view().num_kv_heads;
    for (size_t d = 0; d < key.size(); ++d) {
      filled_.k.set(b, token, h, static_cast<int>(d), key[d]);
    }
  }
  void encode_again() {
    const std::vector<int32_t> first_slot(filled_.cache.num_rows(), 0);
    const std::vector<int> start(filled_.cache.num_sequences(), 0);
    std::vector<uint8_t> workspace(filled_.key.workspace_bytes());
    filled_.key.fit(filled_.k.all().rows, view(), workspace.data(), nullptr);
    filled_.key.encode(filled_.k.part(start, filled_.cache.spec().encoded).rows, first_slot.data(),
                       view(), workspace.data(), nullptr);
    filled_.cache.fill_exact(filled_.k, filled_.v);
  }

  void select_with(const std::string& variant, const Choices& choices) {
    selector_.emplace(make_instance<SelectorInstance>(
        find_variant(SIKV_SELECTOR, "self_index", variant), choices, shape_, cpu(threads_)));
    plan_ = selector_->plan();
    workspace_.assign(plan_.workspace_bytes / 64 + 1, Line{});
    for (Line& line : workspace_) std::memset(line.bytes, 0xd7, sizeof line.bytes);
    for (int b = 0; b < filled_.cache.num_sequences(); ++b) selector_->begin_sequence(b);
  }

  // queries [B, W, Hq, D] as fp32, rounded to the cache's type.
  void observe(const std::vector<float>& queries, int window, int layer = 0) {
    sikv_cache_view view = view_of(layer);
    const std::vector<uint8_t> typed = to_dtype(queries);
    std::vector<int32_t> prompt(filled_.cache.num_sequences());
    for (size_t b = 0; b < prompt.size(); ++b) prompt[b] = filled_.k.count(static_cast<int>(b));
    const RowsPart keys = filled_.k.all(), values = filled_.v.all();
    selector_->observe({.struct_size = sizeof(sikv_observe_args),
                        .num_queries = window,
                        .view = &view,
                        .keys = keys.rows,
                        .values = values.rows,
                        .queries = typed.data(),
                        .prompt_len = prompt.data(),
                        .w_o = nullptr,
                        .hidden = 0,
                        .reserved2 = 0},
                       workspace_.data(), nullptr);
  }

  // One step of one layer; q [B, Hq, D].
  std::vector<Slots> step(int64_t number, const std::vector<float>& q, int layer = 0) {
    sikv_cache_view view = view_of(layer);
    const std::vector<uint8_t> typed = to_dtype(q);
    const int rows = filled_.cache.num_rows();
    Slots slots(static_cast<size_t>(rows) * plan_.capacity + 1, -7);
    Slots counts(rows, -7);
    if (layer == 0) selector_->begin_step(number);
    selector_->run({.struct_size = sizeof(sikv_select_args),
                    .num_query_heads = shape_.num_query_heads,
                    .view = &view,
                    .q = typed.data(),
                    .scale = scale(),
                    .reserved = 0,
                    .selection = {slots.data(), counts.data(), plan_.capacity, 0},
                    .log_weights = nullptr},
                   workspace_.data(), nullptr);
    EXPECT_EQ(slots.back(), -7) << "written behind the selection";
    std::vector<Slots> out;
    for (int row = 0; row < rows; ++row) {
      const auto begin = slots.begin() + int64_t{row} * plan_.capacity;
      out.emplace_back(begin, begin + counts[row]);
    }
    return out;
  }

  double counter(const std::string& name) const { return counters_of(*selector_).at(name); }

  std::vector<float> random_queries(uint64_t seed, int steps = 1) const {
    return gaussian(static_cast<size_t>(steps) * filled_.cache.num_sequences() *
                        shape_.num_query_heads * shape_.head_dim,
                    seed);
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)); }
  const sikv_cache_view& view() const { return filled_.cache.view(); }
  FilledCache& filled() { return filled_; }
  SelectorInstance& selector() { return *selector_; }
  SelectorInstance::Plan plan() const { return plan_; }
  int group() const { return group_; }
  sikv_shape& shape() { return shape_; }

  Slots unpinned(int row) const {
    const CacheView view(this->view());
    Slots slots;
    const auto pinned = view.pinned_slots(row);
    for (int32_t slot = 0; slot < view.encoded_len(row); ++slot) {
      if (!std::binary_search(pinned.begin(), pinned.end(), slot)) slots.push_back(slot);
    }
    return slots;
  }

  // q [B, Hq, D] -> the row's heads [G, D] after rounding to the cache's type.
  std::vector<double> heads(const std::vector<float>& q, int row) const {
    const CacheView view(this->view());
    const std::vector<uint8_t> typed = to_dtype(q);
    std::vector<float> heads(static_cast<size_t>(group_) * view.head_dim());
    QueryView(typed.data(), view, shape_.num_query_heads).load_group(row, heads.data());
    return {heads.begin(), heads.end()};
  }

 private:
  struct alignas(64) Line {
    uint8_t bytes[64];
  };

  std::vector<uint8_t> to_dtype(const std::vector<float>& x) const {
    std::vector<uint8_t> out(x.size() * sikv_dtype_bytes(shape_.dtype));
    for (size_t i = 0; i < x.size(); ++i) sikv_store(out.data(), shape_.dtype, i, x[i]);
    return out;
  }
  sikv_cache_view view_of(int layer) const {
    sikv_cache_view view = this->view();
    view.layer = layer;
    return view;
  }

  int group_;
  sikv_shape shape_;
  int threads_;
  FilledCache filled_;
  std::optional<SelectorInstance> selector_;
  SelectorInstance::Plan plan_{};
  std::vector<Line> workspace_;
};

// ---- the specification again, in fp64 and without the plugin's code ---------------------------

std::vector<double> rotated(std::vector<double> x) {
  std::vector<float> y(x.begin(), x.end());
  rotation::forward(y.data(), static_cast<int>(y.size()));
  return {y.begin(), y.end()};
}

// tables [groups, 16] of one query.
std::vector<double> exact_tables(const CacheView& view, int row, std::vector<double> query) {
  if (rlm4::is_keys(view.key().layout())) query = rotated(std::move(query));
  const float* codebook = view.key().table(SIKV_CODEBOOK, row);
  std::vector<double> tables(query.size() / 4 * 16);
  for (size_t e = 0; e < tables.size(); ++e) {
    for (size_t i = 0; i < 4; ++i) tables[e] += query[e / 16 * 4 + i] * codebook[e * 4 + i];
  }
  return tables;
}

// Returns the unit of the result.
double round_to_six_bits(std::vector<double>& tables, bool keep_unit) {
  double widest = 0.0, offset = 0.0;
  for (size_t g = 0; g < tables.size(); g += 16) {
    const auto [low, high] = std::minmax_element(&tables[g], &tables[g] + 16);
    const double lowest = *low;
    widest = std::max(widest, *high - lowest);
    offset += lowest;
    for (size_t c = 0; c < 16; ++c) tables[g + c] -= lowest;
  }
  for (double& x : tables) x = std::nearbyint(x * 63.0 / widest);
  if (!keep_unit) return 1.0;
  const double unit = widest / 63.0, share = offset / (static_cast<double>(tables.size()) / 16);
  for (double& x : tables) x = x * unit + share;
  return unit;
}

struct IndexScores {
  std::vector<double> scores;  // [encoded_len]
  double rounding;             // how far off a score may be
};
IndexScores index_scores(const Bench& bench, const std::vector<float>& q, int row,
                         const std::map<std::string, std::string>& options) {
  const CacheView view(bench.view());
  const int dim = view.head_dim(), group = bench.group();
  const std::vector<double> heads = bench.heads(q, row);
  const auto option = [&](const char* name, const char* otherwise) {
    const auto found = options.find(name);
    return found == options.end() ? otherwise : found->second;
  };
  const bool every_head = option("group", "mean") == "max_over_heads";
  const bool norm = option("weighting", "none") == "norm";
  std::vector<std::vector<double>> queries;
  if (every_head) {
    for (int g = 0; g < group; ++g) {
      queries.emplace_back(heads.begin() + g * dim, heads.begin() + (g + 1) * dim);
    }
  } else {
    queries.emplace_back(dim);
    for (size_t i = 0; i < heads.size(); ++i) queries[0][i % dim] += heads[i] / group;
  }
  std::vector<double> scores(view.encoded_len(row), -std::numeric_limits<double>::infinity());
  double rounding = 1e-5;
  for (const std::vector<double>& query : queries) {
    std::vector<double> tables = exact_tables(view, row, query);
    if (option("tables", "exact") == "6bit") {
      // An entry halfway between two integers may be rounded to either.
      rounding = std::max(rounding, round_to_six_bits(tables, every_head || norm));
    }
    for (size_t slot = 0; slot < scores.size(); ++slot) {
      const uint8_t* page = view.key().page(SIKV_INDEX_CODE, row, static_cast<int>(slot / 256));
      double score = 0.0;
      for (int g = 0; g < dim / 4; ++g) {
        score += tables[g * 16 + nibble_tile::get(page, dim, slot % 256, g)];
      }
      scores[slot] = std::max(scores[slot], score);
    }
  }
  if (norm) {
    for (size_t slot = 0; slot < scores.size(); ++slot) {
      scores[slot] *= rlm4::token_scale(
          view.key().page(SIKV_SCALE, row, static_cast<int>(slot / 256)), slot % 256);
    }
  }
  return {scores, rounding};
}

// probability [candidates] of the rerank.
std::vector<double> rerank_scores(const Bench& bench, const std::vector<float>& q, int row,
                                  const Slots& candidates) {
  const CacheView view(bench.view());
  const int dim = view.head_dim(), group = bench.group();
  const std::vector<double> heads = bench.heads(q, row);
  const size_t pinned = view.pinned_slots(row).size();
  const size_t tail = view.tail_len(row / view.num_kv_heads());
  std::vector<std::vector<float>> keys;
  for (int32_t slot : candidates) {
    keys.emplace_back(dim);
    view.key().decode(row, {&slot, 1}, keys.back().data());
  }
  for (size_t i = 0; i < pinned + tail; ++i) {
    keys.emplace_back(dim);
    if (i < pinned) {
      view.load_pinned_k(row, static_cast<int>(i), keys.back().data());
    } else {
      view.load_tail_k(row, static_cast<int>(i - pinned), keys.back().data());
    }
  }
  std::vector<double> mean(candidates.size());
  for (int g = 0; g < group; ++g) {
    std::vector<double> p;
    for (const std::vector<float>& key : keys) {
      double logit = 0.0;
      for (int d = 0; d < dim; ++d) logit += heads[g * dim + d] * key[d];
      p.push_back(std::exp(logit * bench.scale()));
    }
    const double total = std::accumulate(p.begin(), p.end(), 0.0);
    for (size_t i = 0; i < mean.size(); ++i) mean[i] += p[i] / total / group;
  }
  return mean;
}

// `chosen` are `count` of `candidates`, ascending, and none that was left out scores more than
// `slack` above one that was taken.
void expect_top(const Slots& chosen, const Slots& candidates, const std::vector<double>& scores,
                size_t count, double slack) {
  ASSERT_EQ(chosen.size(), std::min(count, candidates.size()));
  ASSERT_TRUE(std::is_sorted(chosen.begin(), chosen.end()));
  double worst = std::numeric_limits<double>::infinity(), best = -worst;
  size_t found = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const bool taken = std::binary_search(chosen.begin(), chosen.end(), candidates[i]);
    found += taken;
    (taken ? worst : best) = taken ? std::min(worst, scores[i]) : std::max(best, scores[i]);
  }
  EXPECT_EQ(found, chosen.size()) << "a slot that is pinned, not encoded, or chosen twice";
  EXPECT_LE(best, worst + slack);
}

std::vector<double> at(const std::vector<double>& scores, const Slots& slots) {
  std::vector<double> out;
  for (int32_t slot : slots) out.push_back(scores[slot]);
  return out;
}

class SelfIndexTest : public ::testing::TestWithParam<std::string> {};

// Those that run on this machine.
std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const Candidate& candidate :
       registry().candidates(SIKV_SELECTOR, "self_index", cpu().info())) {
    if (candidate.score > 0) names.push_back(candidate.variant->variant);
  }
  return names;
}
INSTANTIATE_TEST_SUITE_P(Variants, SelfIndexTest, ::testing::ValuesIn(variants()));

// ---- tables -------------------------------------------------------------------------------------

TEST(SelfIndexTables, WidestGroupSpans63) {
  float exact[3 * 16];
  for (int c = 0; c < 16; ++c) {
    exact[c] = static_cast<float>(c) - 4.0f;  // 15 wide
    exact[16 + c] = 2.5f;                     // constant
    exact[32 + c] = c == 3 ? 10.0f : 7.0f;    // 3 wide
  }
  uint8_t quantised[3 * 16];
  const self_index::TableScale scale = self_index::quantise_tables(exact, 3, quantised);
  EXPECT_FLOAT_EQ(scale.scale, 15.0f / 63.0f);
  EXPECT_FLOAT_EQ(scale.offset, -4.0f + 2.5f + 7.0f);
  for (int c = 0; c < 16; ++c) {
    EXPECT_EQ(quantised[c], std::lround(4.2 * c)) << c;
    EXPECT_EQ(quantised[16 + c], 0);
    EXPECT_EQ(quantised[32 + c], c == 3 ? 13 : 0);  // 12.6
  }
}

// Subnormal spans count as none: their inverse would overflow.
TEST(SelfIndexTables, ConstantTablesScoreTheirOffset) {
  for (const float span : {0.0f, 1e-40f}) {
    std::vector<float> exact(16 * 16, -1.5f);
    if (span != 0.0f) {
      for (size_t i = 0; i < exact.size(); ++i) exact[i] = span * static_cast<float>(i % 9);
    }
    std::vector<uint8_t> quantised(exact.size(), 9);
    const self_index::TableScale scale =
        self_index::quantise_tables(exact.data(), 16, quantised.data());
    EXPECT_EQ(scale.scale, 0.0f);
    EXPECT_FLOAT_EQ(scale.offset, span == 0.0f ? -24.0f : 0.0f);
    EXPECT_EQ(*std::max_element(quantised.begin(), quantised.end()), 0);
  }
}

// Keys of +-1 make the codebook the sign patterns themselves, and the score the dot product.
TEST_P(SelfIndexTest, SignKeysAreRankedByTheirDotProduct) {
  CacheSpec spec{.num_kv_heads = 1, .head_dim = 64, .dtype = SIKV_FP32, .encoded = {256}};
  Bench bench(spec, kExactKeys, 1);
  Random random(3);
  std::vector<std::vector<float>> keys;
  for (int t = 0; t < 256; ++t) {
    keys.emplace_back(64);
    for (float& x : keys.back()) x = random.below(2) == 0 ? -1.0f : 1.0f;
    bench.set_key(0, t, keys.back());
  }
  bench.encode_again();
  bench.select_with(GetParam(), {{"budget", "20"}});
  std::vector<float> q(64);
  for (int d = 0; d < 64; ++d) q[d] = 0.125f * static_cast<float>(d % 9 - 4);
  std::vector<double> scores;
  for (const auto& key : keys) {
    scores.push_back(std::inner_product(key.begin(), key.end(), q.begin(), 0.0));
  }
  expect_top(bench.step(0, q)[0], bench.unpinned(0), scores, 20, 0.0);
}

// ---- scan ---------------------------------------------------------------------------------------

TEST_P(SelfIndexTest, ScanTakesTheHighestIndexScores) {
  struct Case {
    const Keys* keys;
    Choices options;
  };
  const Case cases[] = {
      {&kSignVq, {}},
      {&kSignVq, {{"tables", "6bit"}}},
      {&kSignVq, {{"group", "max_over_heads"}}},
      {&kRotLm, {}},
      {&kRotLm, {{"tables", "6bit"}}},
      {&kRotLm, {{"group", "max_over_heads"}, {"tables", "6bit"}}},
      {&kRotLm, {{"weighting", "norm"}}},
      {&kRotLm, {{"weighting", "norm"}, {"tables", "6bit"}}},
      {&kRotLm, {{"weighting", "norm"}, {"group", "max_over_heads"}}},
  };
  for (int head_dim : {64, 96, 128, 256}) {
    for (const Case& c : cases) {
      const int group = head_dim == 96 ? 3 : 4;
      CacheSpec spec{.num_kv_heads = 2,
                     .head_dim = head_dim,
                     .dtype = head_dim == 128 ? SIKV_BF16 : SIKV_FP16,
                     .encoded = {513, 0, 257},
                     .tail = {5, 1, 0},
                     .pinned = 16,
                     .seed = static_cast<uint64_t>(head_dim)};
      Bench bench(spec, *c.keys, group, 3);
      for (const char* budget : {"0", "1", "33", "5000"}) {
        Choices options = c.options;
        options.emplace_back("budget", budget);
        SCOPED_TRACE(describe(c.keys->codec, options) + " D=" + std::to_string(head_dim));
        bench.select_with(GetParam(), options);
        const std::vector<float> q = bench.random_queries(17);
        const std::vector<Slots> chosen = bench.step(0, q);
        for (int row = 0; row < bench.filled().cache.num_rows(); ++row) {
          SCOPED_TRACE("row " + std::to_string(row));
          const auto [scores, rounding] =
              index_scores(bench, q, row, {options.begin(), options.end()});
          expect_top(chosen[row], bench.unpinned(row), at(scores, bench.unpinned(row)),
                     std::stoul(budget), rounding);
        }
      }
      EXPECT_EQ(bench.filled().cache.damage(), "");
    }
  }
}

// Tables are the same and sums have one order, so even fp32 scores agree to the bit.
TEST_P(SelfIndexTest, EveryVariantScansAlike) {
  const Choices cases[] = {
      {},
      {{"tables", "6bit"}},
      {{"weighting", "norm"}},
      {{"group", "max_over_heads"}},
      {{"group", "max_over_heads"}, {"tables", "6bit"}, {"weighting", "norm"}}};
  for (int head_dim : {64, 96, 128, 256}) {
    for (int threads : {1, 3}) {
      CacheSpec spec{
          .num_kv_heads = 3, .head_dim = head_dim, .encoded = {1300, 700, 40}, .pinned = 9};
      Bench bench(spec, kRotLm, 2, threads);
      for (Choices options : cases) {
        options.emplace_back("budget", "101");
        SCOPED_TRACE(describe("self_index", options) + " D=" + std::to_string(head_dim));
        const std::vector<float> q = bench.random_queries(55);
        bench.select_with("ref", options);
        const std::vector<Slots> expected = bench.step(0, q);
        bench.select_with(GetParam(), options);
        EXPECT_EQ(bench.step(0, q), expected);
      }
    }
  }
}

TEST_P(SelfIndexTest, TiesGoToTheLowerSlot) {
  for (const char* tables : {"exact", "6bit"}) {
    CacheSpec spec{.num_kv_heads = 2, .head_dim = 64, .encoded = {600}, .pinned = 7};
    Bench bench(spec, kRotLm, 2);
    for (int row = 0; row < 2; ++row) {
      for (int t = 0; t < 600; ++t) bench.set_key(row, t, std::vector<float>(64, 1.0f));
    }
    bench.encode_again();
    bench.select_with(GetParam(), {{"budget", "50"}, {"tables", tables}});
    const std::vector<Slots> chosen = bench.step(0, bench.random_queries(5));
    for (int row = 0; row < 2; ++row) {
      Slots lowest = bench.unpinned(row);
      lowest.resize(50);
      EXPECT_EQ(chosen[row], lowest);
    }
  }
}

TEST_P(SelfIndexTest, ABudgetMayBeAFraction) {
  CacheSpec spec{.num_kv_heads = 1, .head_dim = 64, .encoded = {512, 256}, .tail = {15, 3}};
  Bench bench(spec, kRotLm, 1);
  bench.select_with(GetParam(), {{"budget", "0.1"}});
  EXPECT_EQ(bench.plan().capacity, 409);  // of 4096
  const std::vector<Slots> chosen = bench.step(0, bench.random_queries(1));
  EXPECT_EQ(chosen[0].size(), 52u);  // of 527
  EXPECT_EQ(chosen[1].size(), 25u);  // of 259
}

// ---- rerank -------------------------------------------------------------------------------------

TEST_P(SelfIndexTest, RerankKeepsTheMostProbableCandidates) {
  const Keys keys[] = {kRotLm,
                       {"rot_lm", {{"bits", "2"}}},
                       {"rot_lm", {{"bits", "4"}}},
                       kSignVq,
                       {"sign_vq", {{"magnitude_bits", "4"}, {"scale_type", "fp8_e4m3"}}},
                       {"sign_vq", {{"magnitude_bits", "0"}}},
                       kExactKeys};
  int cases = 0;
  for (int head_dim : {64, 96, 128, 256}) {
    for (const Keys& kind : keys) {
      const int group = cases++ % 9 + 1;
      CacheSpec spec{.num_kv_heads = 2,
                     .head_dim = head_dim,
                     .encoded = {700, 300},
                     .tail = {9, 0},
                     .pinned = 5,
                     .seed = static_cast<uint64_t>(head_dim + group)};
      Bench bench(spec, kind, group);
      SCOPED_TRACE(describe(kind.codec, kind.choices) + " D=" + std::to_string(head_dim) +
                   " G=" + std::to_string(group));
      const std::vector<float> q = bench.random_queries(23);
      bench.select_with(GetParam(), {{"budget", "124"}});
      const std::vector<Slots> candidates = bench.step(0, q);
      // Read where they lie, and from the pool that the scan of step 0 leaves for three more.
      for (const char* period : {"1", "4"}) {
        bench.select_with(GetParam(), {{"budget", "31"}, {"rerank", "4"}, {"scan_every", period}});
        for (int step = 0; step < std::stoi(period); step += 2) {
          const std::vector<float> asked = step == 0 ? q : bench.random_queries(24);
          const std::vector<Slots> chosen = bench.step(step, asked);
          for (int row = 0; row < bench.filled().cache.num_rows(); ++row) {
            SCOPED_TRACE("row " + std::to_string(row) + " step " + std::to_string(step));
            const std::vector<double> p = rerank_scores(bench, asked, row, candidates[row]);
            const double highest = *std::max_element(p.begin(), p.end());
            expect_top(chosen[row], candidates[row], p, 31, 1e-4 * highest);
          }
        }
      }
      EXPECT_EQ(bench.filled().cache.damage(), "");
    }
  }
}

// Head 0 attends to the pinned token so strongly that only head 1's view of the rest counts, though
// head 0's logits of the rest are much larger.
TEST_P(SelfIndexTest, RerankNormalisesEveryHeadOverPinnedAndTail) {
  CacheSpec spec{.num_kv_heads = 1,
                 .head_dim = 64,
                 .dtype = SIKV_FP32,
                 .encoded = {256},
                 .tail = {1},
                 .pinned = 1};
  for (const bool sink_in_tail : {false, true}) {
    Bench bench(spec, kExactKeys, 2);
    const CacheView view(bench.view());
    const int pinned = view.pinned_slots(0)[0];
    Slots liked_by_0, liked_by_1;
    for (int t = 0; t < 257; ++t) {
      std::vector<float> key(64, 0.25f);
      const bool sink = t == (sink_in_tail ? 256 : pinned);
      key[0] = sink ? 200.0f : t % 2 == 0 ? 16.0f : 0.25f;
      key[1] = t % 2 == 0 ? 0.25f : 8.0f;
      bench.set_key(0, t, key);
      if (t < 256 && t != pinned) (t % 2 == 0 ? liked_by_0 : liked_by_1).push_back(t);
    }
    bench.encode_again();
    bench.select_with(GetParam(), {{"budget", "100"}, {"rerank", "4"}});
    std::vector<float> q(2 * 64);
    q[0] = 8.0f;
    q[64 + 1] = 8.0f;
    Slots expected = liked_by_1;
    expected.resize(100);
    EXPECT_EQ(bench.step(0, q)[0], expected);
  }
}

// ---- when rows are scanned ----------------------------------------------------------------------

TEST_P(SelfIndexTest, OneScanServesItsPeriod) {
  CacheSpec spec{.num_kv_heads = 2, .head_dim = 64, .encoded = {768}, .pinned = 8};
  Bench bench(spec, kRotLm, 2);
  const std::vector<float> first = bench.random_queries(1), second = bench.random_queries(2);
  bench.select_with(GetParam(), {{"budget", "160"}});
  const std::vector<Slots> pool = bench.step(0, first), next_pool = bench.step(1, second);
  for (const char* rerank : {"1", "4"}) {
    const size_t budget = 160 / std::stoul(rerank);
    bench.select_with(
        GetParam(), {{"budget", std::to_string(budget)}, {"rerank", rerank}, {"scan_every", "4"}});
    EXPECT_GT(bench.selector().state_bytes(), 0u);
    for (int step = 0; step < 9; ++step) {
      const std::vector<Slots> chosen = bench.step(step, step == 0 ? first : second);
      EXPECT_EQ(bench.counter("scans"), 2.0 * (1 + step / 4)) << step;
      EXPECT_EQ(bench.counter("rows"), 2.0 * (1 + step));
      for (int row = 0; row < 2; ++row) {
        const Slots& candidates = step < 4 ? pool[row] : next_pool[row];
        expect_top(chosen[row], candidates,
                   rerank_scores(bench, step == 0 ? first : second, row, candidates), budget, 1e-6);
      }
    }
  }
}

// 4 x 31 candidates of D = 128 channels: at least 4 bits each and a scale.
TEST_P(SelfIndexTest, TheCpuVariantPacksPoolsThatAreRankedAgain) {
  CacheSpec spec{.num_kv_heads = 1, .head_dim = 128, .encoded = {512}};
  const auto kept = [&](const char* period) {
    Bench bench(spec, kRotLm, 1);
    bench.select_with(GetParam(), {{"budget", "31"}, {"rerank", "4"}, {"scan_every", period}});
    bench.step(0, bench.random_queries(1));
    return bench.selector().state_bytes();
  };
  const uint64_t packed = 124 * (128 / 2 + 4);
  EXPECT_EQ(kept("4") >= packed, GetParam() == "cpu");
  EXPECT_LT(kept("1"), packed);
}

TEST_P(SelfIndexTest, WithoutAPoolNothingIsKept) {
  CacheSpec spec{.num_kv_heads = 1, .head_dim = 64, .encoded = {512}};
  Bench bench(spec, kRotLm, 1);
  bench.select_with(GetParam(), {{"budget", "16"}, {"rerank", "4"}});
  for (int step = 0; step < 3; ++step) bench.step(step, bench.random_queries(step));
  EXPECT_EQ(bench.counter("scans"), 3.0);
  EXPECT_EQ(bench.selector().state_bytes(), 0u);
}

// A bit per channel and token for a scan, and the stored keys of what is ranked after it; between
// scans only the ranking.
TEST_P(SelfIndexTest, CountsTheBytesOfScanAndRanking) {
  CacheSpec spec{.num_kv_heads = 1, .head_dim = 64, .encoded = {512}, .tail = {3}, .pinned = 5};
  Bench bench(spec, kRotLm, 1);
  const double scan = 512 * 64 / 8, exact = (5 + 3) * 64 * sikv_dtype_bytes(spec.dtype);
  const double key = static_cast<double>(layout_page_bytes(*bench.view().key.layout)) / 256;
  bench.select_with(GetParam(), {{"budget", "16"}});
  bench.step(0, bench.random_queries(0));
  EXPECT_EQ(bench.counter("scan_bytes"), scan);
  bench.select_with(GetParam(), {{"budget", "16"}, {"rerank", "4"}});
  for (int step = 0; step < 3; ++step) bench.step(step, bench.random_queries(step));
  EXPECT_EQ(bench.counter("runs"), 3.0);
  EXPECT_EQ(bench.counter("scan_bytes"), 3 * (scan + 64 * key + exact));
  bench.select_with(GetParam(), {{"budget", "64"}, {"scan_every", "4"}});
  for (int step = 0; step < 3; ++step) bench.step(step, bench.random_queries(step));
  EXPECT_EQ(bench.counter("scan_bytes"), scan);
}

TEST_P(SelfIndexTest, ATurnedQueryIsScannedEarlyAndRestartsThePeriod) {
  CacheSpec spec{.num_kv_heads = 2, .head_dim = 64, .encoded = {512}};
  Bench bench(spec, kRotLm, 1);
  // The prompt's queries average to 1 in every channel; cosines are taken around that.
  bench.select_with(
      GetParam(),
      {{"budget", "16"}, {"rerank", "4"}, {"scan_every", "4"}, {"refresh_cosine", "0.5"}});
  bench.observe(std::vector<float>(3 * 2 * 64, 1.0f), 3);
  const auto query = [](float channel0, float channel1) {
    std::vector<float> q(2 * 64, 1.0f);  // row 1 stays at the mean: no direction, never turns
    q[0] += channel0;
    q[1] += channel1;
    return q;
  };
  const struct {
    std::vector<float> q;
    double scans;  // of both rows so far
  } steps[] = {
      {query(1, 0), 2},          // 0: first step
      {query(1, 1), 2},          // 1: cosine 0.71
      {query(0.5f, 1), 3},       // 2: cosine 0.45, row 0 is scanned
      {query(0.5f, 0.9f), 3},    // 3
      {query(0.5f, 0.8f), 4},    // 4: row 1's period is over
      {query(0.5f, 0.7f), 4},    // 5
      {query(0.5f, 0.6f), 5},    // 6: row 0's, counted from step 2
      {query(-0.5f, -0.6f), 6},  // 7: turned round
  };
  for (int step = 0; step < 8; ++step) {
    bench.step(step, steps[step].q);
    EXPECT_EQ(bench.counter("scans"), steps[step].scans) << "step " << step;
  }
}

TEST_P(SelfIndexTest, StaggeredHeadsSpreadTheirScans) {
  CacheSpec spec{.num_kv_heads = 3, .head_dim = 64, .encoded = {512}};
  Bench bench(spec, kRotLm, 1);
  bench.select_with(GetParam(), {{"budget", "16"}, {"scan_every", "4"}, {"stagger", "true"}});
  const std::vector<float> q = bench.random_queries(4);
  double before = 0.0;
  for (int step = 0; step < 13; ++step) {
    int expected = 0;
    for (int layer = 0; layer < 4; ++layer) {
      bench.step(step, q, layer);
      for (int head = 0; head < 3; ++head) {
        expected += step == 0 || (step + layer * 3 + head) % 4 == 0;
      }
    }
    const double scans = bench.counter("scans");
    EXPECT_EQ(scans - before, expected);
    if (step > 0) {
      EXPECT_EQ(scans - before, 3.0) << "12 heads, every 4 steps";
    }
    before = scans;
  }
}

TEST_P(SelfIndexTest, PagesEncodedSinceTheScanAreCandidates) {
  for (const char* rerank : {"1", "3"}) {
    CacheSpec spec{.num_kv_heads = 1, .head_dim = 64, .encoded = {768}, .pinned = 12, .seed = 8};
    Bench bench(spec, kRotLm, 2);
    bench.filled().cache.set_encoded_len(0, 512);
    const std::vector<float> q = bench.random_queries(6);
    // The pinned tokens of the test lie in all three pages; none may be chosen.
    bench.select_with(GetParam(), {{"budget", std::to_string(20 * std::stoi(rerank))}});
    Slots pool = bench.step(0, q)[0];
    bench.select_with(GetParam(), {{"budget", "20"}, {"rerank", rerank}, {"scan_every", "8"}});
    bench.step(0, q);
    bench.filled().cache.set_encoded_len(0, 768);
    const Slots chosen = bench.step(1, q)[0];
    EXPECT_EQ(bench.counter("scans"), 1.0);
    for (int32_t slot : bench.unpinned(0)) {
      if (slot >= 512) pool.push_back(slot);
    }
    expect_top(chosen, pool, rerank_scores(bench, q, 0, pool), 20, 1e-6);
    EXPECT_GE(chosen.back(), 512);
  }
}

TEST_P(SelfIndexTest, ANewSequenceStartsWithAScan) {
  CacheSpec spec{.num_kv_heads = 2, .head_dim = 64, .encoded = {512, 512}};
  Bench bench(spec, kRotLm, 1);
  bench.select_with(GetParam(), {{"budget", "16"}, {"scan_every", "8"}});
  const std::vector<float> q = bench.random_queries(4);
  bench.step(0, q);
  EXPECT_EQ(bench.counter("scans"), 4.0);
  bench.selector().begin_sequence(1);
  bench.step(1, q);
  EXPECT_EQ(bench.counter("scans"), 6.0);
}

// ---- schedule: auto -----------------------------------------------------------------------------

// Prompt queries that stay the same need one scan; queries that each ask for one other token need
// one each.
TEST_P(SelfIndexTest, AutoScheduleTellsSteadyHeadsFromRetrieval) {
  constexpr int kWindow = 16;
  CacheSpec spec{
      .num_kv_heads = 2, .head_dim = 64, .dtype = SIKV_FP32, .encoded = {512}, .tail = {64}};
  Bench bench(spec, kRotLm, 1);
  std::vector<float> queries;
  const std::vector<float> steady = gaussian(64, 99);
  for (int i = 0; i < kWindow; ++i) {
    queries.insert(queries.end(), steady.begin(), steady.end());
    const std::vector<float> key = bench.filled().k.row(0, 20 * i, 1);
    for (float x : key) queries.push_back(3.0f * x);
  }
  const auto scans_in_8_steps = [&](const char* tolerance) {
    bench.select_with(GetParam(), {{"budget", "8"},
                                   {"rerank", "2"},
                                   {"schedule", "auto"},
                                   {"tolerance", tolerance},
                                   {"window", std::to_string(kWindow)}});
    bench.observe(queries, kWindow);
    const std::vector<float> q = bench.random_queries(12);
    for (int step = 0; step < 8; ++step) bench.step(step, q);
    return bench.counter("scans");
  };
  EXPECT_EQ(scans_in_8_steps("0.01"), 1.0 + 8.0);
  EXPECT_EQ(scans_in_8_steps("1"), 1.0 + 1.0);
}

// Dropped mass of a replay by the definition: every query in turn, fp64, exact keys.
double replayed_dropped_mass(Bench& bench, const std::vector<std::vector<float>>& queries, int row,
                             int period, int budget, int rerank) {
  const CacheView view(bench.view());
  const int prompt = bench.filled().k.count(0), count = static_cast<int>(queries.size());
  double dropped = 0.0;
  Slots scanned;
  for (int i = 0; i < count; ++i) {
    const int position = prompt - count + i;
    if (i % period == 0) {
      bench.select_with("ref", {{"budget", std::to_string(budget * rerank)}});
      scanned = bench.step(0, queries[i])[row];
    }
    const std::vector<double> heads = bench.heads(queries[i], row);
    std::vector<double> p(position + 1);
    for (int g = 0; g < bench.group(); ++g) {
      std::vector<double> e;
      for (int t = 0; t <= position; ++t) {
        const std::vector<float> key = bench.filled().k.row(0, t, row);
        const double* head = heads.data() + g * view.head_dim();
        e.push_back(
            std::exp(bench.scale() * std::inner_product(key.begin(), key.end(), head, 0.0)));
      }
      const double total = std::accumulate(e.begin(), e.end(), 0.0);
      for (int t = 0; t <= position; ++t) p[t] += e[t] / total / bench.group();
    }
    Slots seen;
    std::copy_if(scanned.begin(), scanned.end(), std::back_inserter(seen),
                 [&](int32_t slot) { return slot <= position; });
    std::sort(seen.begin(), seen.end(), [&](int32_t a, int32_t b) { return p[a] > p[b]; });
    seen.resize(std::min<size_t>(seen.size(), budget));
    std::set<int> kept(seen.begin(), seen.end());
    for (int32_t slot : view.pinned_slots(row)) {
      if (slot <= position) kept.insert(slot);
    }
    for (int t = std::min(view.encoded_len(row), prompt - count); t <= position; ++t)
      kept.insert(t);
    dropped += 1.0;
    for (int t : kept) dropped -= p[t];
  }
  return dropped / count;
}

// With fewer queries than the window, and encoded tokens among the replayed positions or not.
TEST_P(SelfIndexTest, AutoScheduleReplaysByItsDefinition) {
  constexpr int kQueries = 11, kBudget = 6, kRerank = 3, kPrompt = 600;
  for (int encoded : {512, 596}) {
    CacheSpec spec{.num_kv_heads = 2,
                   .head_dim = 64,
                   .dtype = SIKV_FP32,
                   .encoded = {encoded},
                   .tail = {kPrompt - encoded},
                   .pinned = 30};
    Bench bench(spec, kRotLm, 3);
    std::vector<float> all = bench.random_queries(31, kQueries);
    for (float& x : all) x *= 2.0f;
    std::vector<std::vector<float>> queries;
    for (size_t i = 0, n = all.size() / kQueries; i < kQueries; ++i) {
      queries.emplace_back(all.begin() + i * n, all.begin() + (i + 1) * n);
    }
    std::vector<std::map<int, double>> excess(2);
    std::vector<double> limits = {0.0};
    for (int row = 0; row < 2; ++row) {
      const double base = replayed_dropped_mass(bench, queries, row, 1, kBudget, kRerank);
      for (int s : {2, 4, 8}) {
        excess[row][s] = replayed_dropped_mass(bench, queries, row, s, kBudget, kRerank) - base;
        limits.push_back(excess[row][s]);
      }
    }
    // Between two neighbouring excesses the choice cannot hang on rounding.
    std::sort(limits.begin(), limits.end());
    for (size_t i = 1; i < limits.size(); ++i) {
      const double tolerance = (limits[i - 1] + limits[i]) / 2.0;
      if (tolerance < 0.0 || limits[i] - limits[i - 1] < 1e-6) continue;
      double expected = 0.0;
      for (const auto& row : excess) {
        int period = 1;
        for (const auto& [s, more] : row) period = more <= tolerance ? s : period;
        expected += 8.0 / period;
      }
      std::ostringstream text;
      text << std::setprecision(15) << tolerance;
      bench.select_with(GetParam(), {{"budget", std::to_string(kBudget)},
                                     {"rerank", std::to_string(kRerank)},
                                     {"schedule", "auto"},
                                     {"tolerance", text.str()}});
      bench.observe(all, kQueries);
      for (int step = 0; step < 8; ++step) bench.step(step, queries[0]);
      EXPECT_EQ(bench.counter("scans"), expected) << "tolerance " << tolerance;
    }
  }
}

// ---- refusals -----------------------------------------------------------------------------------

TEST_P(SelfIndexTest, RefusesLayoutsWithoutAnIndex) {
  CacheSpec spec{.num_kv_heads = 1, .head_dim = 64, .encoded = {256}};
  Bench bench(spec, {"fp16", {}}, 1);
  bench.select_with(GetParam(), {});
  const std::string why = bench.selector().refusal(bench.filled().key.describe());
  EXPECT_NE(why.find("use key codec sign_vq or rot_lm"), std::string::npos) << why;
}

TEST_P(SelfIndexTest, NormWeightingNeedsAScalePerToken) {
  CacheSpec spec{.num_kv_heads = 1, .head_dim = 64, .encoded = {256}};
  Bench sign(spec, kSignVq, 1), rotated(spec, kRotLm, 1);
  for (Bench* bench : {&sign, &rotated}) {
    bench->select_with(GetParam(), {{"weighting", "norm"}});
    const std::string why = bench->selector().refusal(bench->filled().key.describe());
    EXPECT_EQ(why.empty(), bench == &rotated) << why;
  }
}

TEST_P(SelfIndexTest, RefusesAPeriodBesideTheSchedule) {
  CacheSpec spec{.num_kv_heads = 1, .head_dim = 64, .encoded = {256}};
  Bench bench(spec, kRotLm, 1);
  EXPECT_THROW(bench.select_with(GetParam(), {{"schedule", "auto"}, {"scan_every", "4"}}), Error);
}

TEST_P(SelfIndexTest, RefusesQueriesThatAreNotFinite) {
  CacheSpec spec{.num_kv_heads = 1, .head_dim = 64, .encoded = {256}};
  Bench bench(spec, kRotLm, 2);
  bench.select_with(GetParam(), {});
  std::vector<float> q = bench.random_queries(1);
  q[64 + 9] = std::numeric_limits<float>::quiet_NaN();
  try {
    bench.step(0, q);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("head 1, position 255, channel 9"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace sikv::testing
