// Every kernel x variant x pair of layouts it reads against attention in fp64 on the decoded
// tokens.
//
// The tolerance is derived: what a plain fp32 run of the same tokens gets wrong, twice, and a few
// roundings of the largest value.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "tests/conformance/cases.h"
#include "tests/support/device_call.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

class KernelConformance : public VariantTest {};
INSTANTIATE_TEST_SUITE_P(All, KernelConformance, ::testing::ValuesIn(subjects(SIKV_KERNEL)),
                         test_name);

// What a kernel is asked to select; per row a list, or nothing for SIKV_SELECT_ALL.
using Selection = std::vector<std::optional<Slots>>;

enum class Select { kAll, kNothing, kOne, kSome, kMixed };

Selection make_selection(const FilledCache& filled, Select select, uint64_t seed) {
  const sikv_cache_view& view = filled.cache.view();
  Random random(seed);
  Selection selection;
  for (int row = 0; row < filled.cache.num_rows(); ++row) {
    if (select == Select::kAll || (select == Select::kMixed && row % 2 == 0)) {
      selection.emplace_back();
      continue;
    }
    const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
    Slots slots;
    for (int32_t slot = 0; slot < view.encoded_len[row]; ++slot) {
      const bool is_pinned = std::binary_search(pinned, pinned + view.pinned_len[row], slot);
      const bool wanted = select == Select::kOne ? slots.empty() : random.below(3) == 0;
      if (!is_pinned && wanted && select != Select::kNothing) slots.push_back(slot);
    }
    selection.emplace_back(std::move(slots));
  }
  return selection;
}

// ---- attention as it should be ------------------------------------------------------------------

struct Tokens {
  int head_dim = 0;
  std::vector<float> k, v;  // [n, D]
  size_t size() const { return k.size() / static_cast<size_t>(head_dim); }
};

// What a kernel attends to in one row: pinned and tail exact, the rest as the codecs decode it.
Tokens attended(const FilledCache& filled, int row, const std::optional<Slots>& selected) {
  const sikv_cache_view& view = filled.cache.view();
  const int b = row / view.num_kv_heads, h = row % view.num_kv_heads;
  Tokens tokens{view.head_dim, {}, {}};
  const auto add_exact = [&](int position) {
    const std::vector<float> k = filled.k.row(b, position, h), v = filled.v.row(b, position, h);
    tokens.k.insert(tokens.k.end(), k.begin(), k.end());
    tokens.v.insert(tokens.v.end(), v.begin(), v.end());
  };
  const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  const int num_pinned = view.pinned_len[row];
  Slots slots = selected.value_or(Slots());
  for (int32_t slot = 0; !selected && slot < view.encoded_len[row]; ++slot) {
    if (!std::binary_search(pinned, pinned + num_pinned, slot)) slots.push_back(slot);
  }
  tokens.k = decode_slots(filled.key, filled.cache, row, slots);
  tokens.v = decode_slots(filled.value, filled.cache, row, slots);
  for (int i = 0; i < num_pinned; ++i) add_exact(pinned[i]);
  for (int t = 0; t < view.tail_len[b]; ++t) add_exact(view.encoded_len[row] + t);
  return tokens;
}

// Outputs of all heads, [B, Hq, D] and [B, Hq], in the precision they were computed in.
struct Output {
  std::vector<double> out, lse;
};

// The textbook: logits, maximum, weights, sum; everything in T. Returns the largest logit by
// magnitude.
template <typename T>
T attend(const Tokens& tokens, const float* q, float scale, std::span<const float> log_weights,
         double* out, double* lse) {
  const int dim = tokens.head_dim;
  std::vector<T> weights(tokens.size()), sum_v(static_cast<size_t>(dim), T(0));
  T max = -std::numeric_limits<T>::infinity(), sum = T(0), largest = T(0);
  for (size_t t = 0; t < weights.size(); ++t) {
    T dot = T(0);
    for (int d = 0; d < dim; ++d) {
      dot += static_cast<T>(q[d]) * static_cast<T>(tokens.k[t * static_cast<size_t>(dim) + d]);
    }
    weights[t] = static_cast<T>(scale) * dot;
    largest = std::max(largest, std::abs(weights[t]));
    if (t < log_weights.size()) weights[t] += static_cast<T>(log_weights[t]);
    max = std::max(max, weights[t]);
  }
  for (size_t t = 0; t < weights.size(); ++t) {
    const T weight = std::exp(weights[t] - max);
    sum += weight;
    for (int d = 0; d < dim; ++d) {
      sum_v[static_cast<size_t>(d)] +=
          weight * static_cast<T>(tokens.v[t * static_cast<size_t>(dim) + d]);
    }
  }
  for (int d = 0; d < dim; ++d) {
    out[d] = weights.empty() ? 0.0 : static_cast<double>(sum_v[static_cast<size_t>(d)] / sum);
  }
  *lse = weights.empty() ? -std::numeric_limits<double>::infinity()
                         : static_cast<double>(max + std::log(sum));
  return largest;
}

// What a weighing selector could add to the logits of a list's tokens.
std::vector<float> weights_of(int64_t head, size_t count) {
  std::vector<float> log_weights;
  for (size_t i = 0; i < count; ++i) {
    log_weights.push_back(i % 5 == 4
                              ? -std::numeric_limits<float>::infinity()
                              : 0.5f * static_cast<float>((static_cast<size_t>(head) + i) % 9));
  }
  return log_weights;
}

struct Expected {
  Output exact, plain;         // in fp64 and in fp32
  double largest_logit = 0.0;  // by magnitude
};

Expected attend_all_heads(const FilledCache& filled, const Case& c, const Selection& selection,
                          const std::vector<uint8_t>& q, float scale, bool weighted = false) {
  const int dim = c.cache.head_dim;
  Expected expected;
  for (Output* output : {&expected.exact, &expected.plain}) {
    output->out.resize(q.size() / static_cast<size_t>(sikv_dtype_bytes(c.cache.dtype)));
    output->lse.resize(output->out.size() / static_cast<size_t>(dim));
  }
  std::vector<float> query(static_cast<size_t>(dim));
  for (int row = 0; row < filled.cache.num_rows(); ++row) {
    const Tokens tokens = attended(filled, row, selection[static_cast<size_t>(row)]);
    for (int g = 0; g < c.group; ++g) {
      // Query heads of one KV head follow each other, and rows are (sequence, KV head).
      const int64_t head = int64_t{row} * c.group + g;
      for (int d = 0; d < dim; ++d) {
        query[static_cast<size_t>(d)] = sikv_load(q.data(), c.cache.dtype, head * dim + d);
      }
      const auto& selected = selection[static_cast<size_t>(row)];
      const std::vector<float> weights =
          weights_of(head, weighted && selected ? selected->size() : 0);
      const double largest =
          attend<double>(tokens, query.data(), scale, weights,
                         expected.exact.out.data() + head * dim, expected.exact.lse.data() + head);
      expected.largest_logit = std::max(expected.largest_logit, largest);
      attend<float>(tokens, query.data(), scale, weights, expected.plain.out.data() + head * dim,
                    expected.plain.lse.data() + head);
    }
  }
  return expected;
}

// Largest difference; equal infinities do not differ, NaN is infinitely far from everything.
double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = a[i] == b[i] ? 0.0 : std::abs(a[i] - b[i]);
    if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, difference);
  }
  return largest;
}

TEST(Distance, NothingHidesANaN) {
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(distance({1, 2, 3}, {1, 2.5, 2}), 1.0);
  EXPECT_EQ(distance({-infinity, 1}, {-infinity, 1}), 0.0);
  EXPECT_EQ(distance({nan, 1}, {1, 1}), infinity);
  EXPECT_EQ(distance({1, nan, 1}, {2, 1, 1}), infinity);
  EXPECT_EQ(distance({infinity}, {-infinity}), infinity);
}

double largest_magnitude(const std::vector<double>& x) {
  double largest = 0.0;
  for (double value : x) {
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  }
  return largest;
}

// ---- a kernel at work ---------------------------------------------------------------------------

float scale_of(const Case& c) { return 1.0f / std::sqrt(static_cast<float>(c.cache.head_dim)); }

Output run_kernel(KernelInstance& kernel, const FilledCache& filled, const Case& c,
                  const Selection& selection, const std::vector<uint8_t>& q,
                  bool weighted = false) {
  const auto rows = static_cast<size_t>(filled.cache.num_rows());
  size_t capacity = 0;
  for (const auto& row : selection) capacity = std::max(capacity, row ? row->size() : 0);
  Guarded<int32_t> slots(rows * capacity), counts(rows);
  for (size_t row = 0; row < rows; ++row) {
    counts.data()[row] = SIKV_SELECT_ALL;
    if (!selection[row]) continue;
    counts.data()[row] = static_cast<int32_t>(selection[row]->size());
    std::copy(selection[row]->begin(), selection[row]->end(), slots.data() + row * capacity);
  }
  const size_t heads = rows * static_cast<size_t>(c.group);
  Guarded<float> out(heads * static_cast<size_t>(c.cache.head_dim)), lse(heads);
  std::vector<float> log_weights(weighted ? heads * capacity : 0);
  for (size_t head = 0; weighted && head < heads; ++head) {
    const auto of = weights_of(static_cast<int64_t>(head), capacity);
    std::copy(of.begin(), of.end(), log_weights.begin() + static_cast<ptrdiff_t>(head * capacity));
  }
  Workspace workspace(kernel.plan(static_cast<int32_t>(capacity)));
  DeviceCall call(device_of(kernel.variant()));
  const sikv_cache_view& view = call.view(filled.cache);
  kernel.run({sizeof(sikv_attend_args),
              view.num_kv_heads * c.group,
              &view,
              call.in(q),
              scale_of(c),
              0,
              {call.out(slots), call.out(counts), static_cast<int32_t>(capacity), 0},
              call.out(out),
              call.out(lse),
              weighted ? call.in(log_weights) : nullptr},
             call.out(workspace), call.stream());
  call.finish();
  EXPECT_TRUE(out.intact() && lse.intact()) << "written outside of the output";
  EXPECT_TRUE(workspace.intact()) << "written outside of the workspace";
  EXPECT_TRUE(slots.intact() && counts.intact());
  EXPECT_EQ(filled.cache.damage(), "");
  return {{out.data(), out.data() + out.size()}, {lse.data(), lse.data() + lse.size()}};
}

constexpr double kRounding = 0x1p-24;

void expect_as_good_as_plain_fp32(KernelInstance& kernel, const FilledCache& filled, const Case& c,
                                  const Selection& selection, bool weighted = false) {
  const std::vector<uint8_t> q = make_queries(c, 3);
  const Output got = run_kernel(kernel, filled, c, selection, q, weighted);
  const auto [exact, plain, largest_logit] =
      attend_all_heads(filled, c, selection, q, scale_of(c), weighted);
  EXPECT_LE(distance(got.out, exact.out),
            2.0 * distance(plain.out, exact.out) + 8.0 * kRounding * largest_magnitude(exact.out));
  EXPECT_LE(distance(got.lse, exact.lse),
            2.0 * distance(plain.lse, exact.lse) + 8.0 * kRounding * largest_magnitude(exact.lse));
}

// The largest error of a head, as a part of the head's largest number: where heads differ by many
// powers of two, what is small to one is all of another.
double worst_head(const Output& output, const Output& exact) {
  const auto dim = static_cast<ptrdiff_t>(exact.out.size() / exact.lse.size());
  double worst = 0.0;
  for (ptrdiff_t first = 0; first < std::ssize(exact.out); first += dim) {
    const auto head = [&](const Output& of) {
      return std::vector<double>(of.out.begin() + first, of.out.begin() + first + dim);
    };
    const double error = distance(head(output), head(exact));
    if (error > 0.0) worst = std::max(worst, error / largest_magnitude(head(exact)));
  }
  return worst;
}

// More than of all heads together are two roundings of the logit of a token that makes up all of a
// head: its error is the head's, and no other token's averages it out. At most 8, those of a logit
// of 4.
void expect_every_head_as_good_as_plain_fp32(KernelInstance& kernel, const FilledCache& filled,
                                             const Case& c, const Selection& selection) {
  const std::vector<uint8_t> q = make_queries(c, 3);
  const Output got = run_kernel(kernel, filled, c, selection, q);
  const auto [exact, plain, largest_logit] = attend_all_heads(filled, c, selection, q, scale_of(c));
  const double roundings = 8.0 + 2.0 * std::min(largest_logit, 4.0);
  EXPECT_LE(worst_head(got, exact), 2.0 * worst_head(plain, exact) + roundings * kRounding);
}

struct LayoutPair {
  CodecChoice key, value;
};

// All pairs of default layouts; with `all` also every other layout beside rows as they came, and
// keys and values of one codec with the same options.
std::vector<LayoutPair> layout_pairs(bool all) {
  std::vector<LayoutPair> pairs;
  for (const CodecChoice& key : all_layouts(SIKV_KEY_CODEC)) {
    for (const CodecChoice& value : all_layouts(SIKV_VALUE_CODEC)) {
      const bool both = key.is_default && value.is_default;
      const bool one = key.id == "fp16" || value.id == "fp16";
      const bool same = key.id == value.id && key.choices == value.choices;
      if (both || (all && (one || same))) pairs.push_back({key, value});
    }
  }
  return pairs;
}

// A kernel that takes so many pairs reads keys and values apart.
bool reads_them_apart(const Variant& variant, const std::vector<LayoutPair>& layouts) {
  return 16 < std::count_if(layouts.begin(), layouts.end(), [&](const LayoutPair& pair) {
           const sikv_shape shape = make_shape(128, SIKV_FP16);
           const auto key = make_codec(SIKV_KEY_CODEC, pair.key.id, pair.key.choices, shape);
           const auto value =
               make_codec(SIKV_VALUE_CODEC, pair.value.id, pair.value.choices, shape);
           return make_instance<KernelInstance>(variant, {}, shape)
               .refusal(key.describe(), value.describe())
               .empty();
         });
}

// Runs body(kernel, filled, c) on a cache for each case x pair of layouts that the variant reads;
// one at least. Of four cases or more each gets a quarter of the pairs that a kernel reads apart, in
// turn.
template <typename Body>
void for_each_cache(const Variant& variant, const std::vector<Case>& cases,
                    const std::vector<LayoutPair>& layouts, Body&& body,
                    Pattern keys = Pattern::kGaussian, Pattern values = Pattern::kGaussian) {
  int caches = 0;
  const bool in_turn = cases.size() >= 4 && reads_them_apart(variant, layouts);
  size_t turn = 0;
  for (const Case& c : cases) {
    const ExactRows rows(c.cache, keys, values);
    ++turn;
    for (size_t i = 0; i < layouts.size(); ++i) {
      if (in_turn && (turn + i) % 4 != 0) continue;
      const auto& [key, value] = layouts[i];
      SCOPED_TRACE(describe(key) + "+" + describe(value) + ", " + describe(c));
      auto key_codec = try_codec(SIKV_KEY_CODEC, key, shape_of(c));
      auto value_codec = try_codec(SIKV_VALUE_CODEC, value, shape_of(c));
      if (!key_codec || !value_codec) continue;
      KernelInstance kernel = make_instance<KernelInstance>(variant, {}, shape_of(c));
      if (!kernel.refusal(key_codec->describe(), value_codec->describe()).empty()) continue;
      ++caches;
      FilledCache filled(c.cache, rows, std::move(*key_codec), std::move(*value_codec));
      if (variant.device == SIKV_CUDA &&
          !filled.attach_gpu_codecs(key.choices, value.choices, shape_of(c))) {
        continue;
      }
      body(kernel, filled, c);
      if (::testing::Test::HasFailure()) return;
    }
  }
  EXPECT_GT(caches, 0) << "reads no pair of these layouts";
}

std::vector<Select> selects_of(const Variant& variant) {
  if ((variant.kernel().flags & SIKV_KERNEL_ATTENDS_ALL) != 0) return {Select::kAll};
  return {Select::kAll, Select::kNothing, Select::kOne, Select::kSome, Select::kMixed};
}

void check_all_selections(const Variant& variant, KernelInstance& kernel, const FilledCache& filled,
                          const Case& c) {
  for (const Select select : selects_of(variant)) {
    SCOPED_TRACE("select " + std::to_string(static_cast<int>(select)));
    const Selection selection = make_selection(filled, select, c.cache.seed);
    expect_as_good_as_plain_fp32(kernel, filled, c, selection);
    if (kernel.weighs()) expect_as_good_as_plain_fp32(kernel, filled, c, selection, true);
  }
}

TEST_P(KernelConformance, IsAsGoodAsPlainFp32OnAwkwardShapes) {
  for_each_cache(variant(), awkward_cases(), layout_pairs(false),
                 [&](KernelInstance& kernel, const FilledCache& filled, const Case& c) {
                   check_all_selections(variant(), kernel, filled, c);
                 });
}

TEST_P(KernelConformance, IsAsGoodAsPlainFp32OnEveryLayout) {
  const std::vector<Case> cases = {make_case({257, 40}, {3, 0}, 5, 1, 3, 128, SIKV_BF16)};
  for_each_cache(variant(), cases, layout_pairs(true),
                 [&](KernelInstance& kernel, const FilledCache& filled, const Case& c) {
                   check_all_selections(variant(), kernel, filled, c);
                 });
}

// Key means of up to 8 and channels that dominate: logits of tens to hundreds.
TEST_P(KernelConformance, IsAsGoodAsPlainFp32OnHardKeys) {
  const std::vector<Case> cases = {make_case({300, 31}, {20, 1}, 7, 2, 4, 128, SIKV_FP16),
                                   make_case({257}, {1}, 0, 1, 3, 96, SIKV_FP32)};
  for (const Pattern pattern : {Pattern::kOffset, Pattern::kOutliers, Pattern::kConstant,
                                Pattern::kZeros, Pattern::kSubnormal}) {
    SCOPED_TRACE(pattern_name(pattern));
    for_each_cache(
        variant(), cases, layout_pairs(false),
        [&](KernelInstance& kernel, const FilledCache& filled, const Case& c) {
          check_all_selections(variant(), kernel, filled, c);
        },
        pattern, pattern);
  }
}

// Every other slot, the sequence's middle token among them. With `mixed` of odd rows that one alone
// and of the others everything: a short list leaves a CUDA kernel few splits, whose warps then go
// through such rows tile after tile.
Selection around_the_middle(const FilledCache& filled, bool mixed) {
  Selection selection;
  for (int row = 0; row < filled.cache.num_rows(); ++row) {
    const int b = row / filled.cache.view().num_kv_heads, middle = middle_token(filled.k.count(b));
    Slots slots;
    for (const int32_t slot : candidates(filled.cache, row)) {
      if (mixed ? slot == middle : slot % 2 == middle % 2) slots.push_back(slot);
    }
    if (mixed && row % 2 == 0) {
      selection.emplace_back();
    } else {
      selection.emplace_back(std::move(slots));
    }
  }
  return selection;
}

// Values 2^24 times as large as those before or after them. A batch of many short rows leaves a CUDA
// kernel one split of each, and so two tiles of a list to a warp.
TEST_P(KernelConformance, IsAsGoodAsPlainFp32OnValuesOfManyMagnitudes) {
  const bool attends_all = (variant().kernel().flags & SIKV_KERNEL_ATTENDS_ALL) != 0;
  const auto check = [&](KernelInstance& kernel, const FilledCache& filled, const Case& c) {
    std::vector<Selection> selections = {make_selection(filled, Select::kAll, c.cache.seed)};
    if (!attends_all) {
      selections.push_back(around_the_middle(filled, false));
      selections.push_back(around_the_middle(filled, true));
    }
    for (const Selection& selection : selections) {
      SCOPED_TRACE("selection " + std::to_string(&selection - selections.data()));
      expect_every_head_as_good_as_plain_fp32(kernel, filled, c, selection);
    }
  };
  std::vector<Case> cases;
  for (const int group : {1, 4, 8}) {
    cases.push_back(make_case({600, 257}, {5, 0}, 3, 2, group, 128, SIKV_FP16));
  }
  cases.push_back(make_case({600, 257}, {5, 0}, 3, 2, 4, 64, SIKV_FP16));
  const Case batch =
      make_case(std::vector<int>(40, 250), std::vector<int>(40, 1), 0, 5, 1, 128, SIKV_BF16);
  const CodecChoice fp16 = {"fp16", {}, true}, rot_lm = {"rot_lm", {}, true};
  std::vector<LayoutPair> layouts = {{fp16, fp16}};
  for (const CodecChoice& value : default_layouts(SIKV_VALUE_CODEC)) {
    layouts.push_back({rot_lm, value});
  }
  const std::vector<LayoutPair> batch_layouts = {
      {fp16, fp16}, {rot_lm, rot_lm}, {rot_lm, {"intq", {}, true}}};
  for (const Pattern pattern : {Pattern::kHill, Pattern::kPeak}) {
    SCOPED_TRACE(pattern_name(pattern));
    for_each_cache(variant(), cases, layouts, check, Pattern::kGaussian, pattern);
    for_each_cache(variant(), {batch}, batch_layouts, check, Pattern::kGaussian, pattern);
  }
}

TEST_P(KernelConformance, IsAsGoodAsPlainFp32OnRandomCases) {
  std::vector<Case> cases;
  for (uint64_t seed = 0; seed < 10; ++seed) cases.push_back(random_case(seed));
  for_each_cache(variant(), cases, layout_pairs(false),
                 [&](KernelInstance& kernel, const FilledCache& filled, const Case& c) {
                   check_all_selections(variant(), kernel, filled, c);
                 });
}

TEST_P(KernelConformance, AnswersTheSameWithMoreThreads) {
  const std::vector<Case> cases = {make_case({1000, 600, 3}, {5, 0, 1}, 9, 2, 3, 64, SIKV_FP16)};
  for_each_cache(variant(), cases, layout_pairs(false),
                 [&](KernelInstance& kernel, const FilledCache& filled, const Case& c) {
                   KernelInstance threaded = make_instance<KernelInstance>(
                       variant(), {}, shape_of(c), device_of(variant(), 3));
                   ASSERT_EQ(threaded.refusal(filled.key.describe(), filled.value.describe()), "");
                   const Selection selection =
                       make_selection(filled, selects_of(variant()).back(), 1);
                   const std::vector<uint8_t> q = make_queries(c, 3);
                   const Output one = run_kernel(kernel, filled, c, selection, q);
                   const Output three = run_kernel(threaded, filled, c, selection, q);
                   EXPECT_EQ(one.out, three.out);
                   EXPECT_EQ(one.lse, three.lse);
                 });
}

// Without a token the output is 0 and counts for nothing in a merge.
TEST_P(KernelConformance, AnswersNothingWithoutTokens) {
  for_each_cache(
      variant(), {make_case({0, 3}, {0, 2}, 1, 1, 4, 64, SIKV_FP16)}, layout_pairs(false),
      [&](KernelInstance& kernel, const FilledCache& filled, const Case& c) {
        const Output got = run_kernel(kernel, filled, c, make_selection(filled, Select::kAll, 1),
                                      make_queries(c, 3));
        for (int i = 0; i < c.group * c.cache.head_dim; ++i) EXPECT_EQ(got.out[i], 0.0);
        for (int g = 0; g < c.group; ++g) {
          EXPECT_EQ(got.lse[g], -std::numeric_limits<double>::infinity());
        }
      });
}

// ||o - o_S|| <= 2 delta max ||v||: what leaving out tokens of probability delta can cost at most.
TEST_P(KernelConformance, LeavingTokensOutCostsNoMoreThanTheirMass) {
  if ((variant().kernel().flags & SIKV_KERNEL_ATTENDS_ALL) != 0) return;  // leaves nothing out
  const LayoutPair exact_layouts = {{"fp16", {}, true}, {"fp16", {}, true}};
  for_each_cache(variant(), awkward_cases(), {exact_layouts},
                 [&](KernelInstance& kernel, const FilledCache& filled, const Case& c) {
                   const int dim = c.cache.head_dim;
                   const Selection some = make_selection(filled, Select::kSome, 5);
                   const Selection all = make_selection(filled, Select::kAll, 5);
                   const std::vector<uint8_t> q = make_queries(c, 3);
                   const Output got = run_kernel(kernel, filled, c, some, q);
                   const Output exact = attend_all_heads(filled, c, all, q, scale_of(c)).exact;
                   for (int row = 0; row < filled.cache.num_rows(); ++row) {
                     const Tokens tokens = attended(filled, row, std::nullopt);
                     double longest = 0.0;
                     for (size_t t = 0; t < tokens.size(); ++t) {
                       const float* v = tokens.v.data() + t * static_cast<size_t>(dim);
                       longest =
                           std::max(longest, std::sqrt(std::inner_product(v, v + dim, v, 0.0)));
                     }
                     for (int g = 0; g < c.group; ++g) {
                       const auto head = static_cast<size_t>(row * c.group + g);
                       if (std::isinf(got.lse[head])) continue;  // nothing was left
                       double distance = 0.0;
                       for (size_t i = head * dim; i < (head + 1) * dim; ++i) {
                         distance += (got.out[i] - exact.out[i]) * (got.out[i] - exact.out[i]);
                       }
                       const double delta = 1.0 - std::exp(got.lse[head] - exact.lse[head]);
                       EXPECT_LE(std::sqrt(distance), 2.0 * delta * longest + 1e-5 * longest);
                     }
                   }
                 });
}

}  // namespace
}  // namespace sikv::testing
