// What only CUDA variants must hold besides the other suites: groups of up to 16 heads, batches of
// hundreds of ragged sequences, launches sized by a bound that no row reaches, recorded graphs,
// numbers that are refused through the device's fault.

#include <gtest/gtest.h>

#include <cmath>

#include "framework/base/error.h"
#include "tests/conformance/cases.h"
#include "tests/support/device_call.h"
#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

// ---- cases --------------------------------------------------------------------------------------

std::vector<Subject> cuda_subjects(sikv_kind kind) {
  std::vector<Subject> all = subjects(kind);
  std::erase_if(all, [](const Subject& subject) { return subject.variant != "cuda"; });
  return all;
}

std::vector<Case> wide_groups() {
  return {
      make_case({700, 31}, {3, 255}, 16, 1, 16, 128, SIKV_FP16),
      make_case({257}, {1}, 5, 2, 13, 64, SIKV_BF16),
      make_case({300}, {9}, 64, 1, 7, 256, SIKV_FP32),
      make_case({1030}, {0}, 1, 1, 11, 96, SIKV_FP16),
  };
}

// A recorded step is launched for the length that rows will reach, not for the one they have.
Case loosely_bounded() {
  Case c = make_case({900, 31, 0}, {3, 255, 1}, 5, 2, 4, 128, SIKV_FP16);
  c.cache.slack = 20000;
  return c;
}

// Most sequences short, every 64th long.
Case ragged_batch(int batch, int longest, int group) {
  Random random(31);
  std::vector<int> encoded, tail;
  for (int b = 0; b < batch; ++b) {
    const auto most = static_cast<uint64_t>(b % 64 == 5 ? longest : 200);
    encoded.push_back(b % 64 == 5 ? longest - b / 64 * 17 : static_cast<int>(random.below(most)));
    tail.push_back(static_cast<int>(random.below(257)));
    if (encoded.back() + tail.back() == 0) tail.back() = 1;
  }
  return make_case(std::move(encoded), std::move(tail), 7, 1, group, 64, SIKV_FP16);
}

const std::vector<CodecChoice> kCodecs = {{"fp16", {}, true},
                                          {"sign_vq", {}, true},
                                          {"rot_lm", {}, true},
                                          {"rot_lm", {{"layout", "lines"}}, false},
                                          {"kivi", {}, true}};

// body(filled, c) for each case x key codec that has a CUDA variant; values as they came.
template <typename Body>
void for_each_cache(const std::vector<Case>& cases, Body&& body,
                    Pattern pattern = Pattern::kGaussian,
                    const std::vector<CodecChoice>& codecs = kCodecs) {
  for (const Case& c : cases) {
    for (const CodecChoice& keys : codecs) {
      SCOPED_TRACE(describe(keys) + ", " + describe(c));
      auto key_codec = try_codec(SIKV_KEY_CODEC, keys, shape_of(c));
      if (!key_codec) continue;
      FilledCache filled(c.cache, std::move(*key_codec),
                         make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape_of(c)), pattern);
      if (!filled.attach_gpu_codecs(keys.choices, {}, shape_of(c))) continue;
      body(filled, c);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

Case a_million_tokens() {
  return make_case({1'000'000, 5, 300}, {100, 0, 17}, 64, 1, 2, 64, SIKV_FP16);
}
const std::vector<CodecChoice> kRotLm = {{"rot_lm", {}, true}};

// What runs under compute-sanitizer (scripts/test gpu) is named SmallCache: little, but of every
// plugin.
Case small_case() { return make_case({300, 31}, {20, 1}, 7, 2, 4, 128, SIKV_FP16); }

// ---- codecs -------------------------------------------------------------------------------------

class GpuCodec : public VariantTest {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GpuCodec);
INSTANTIATE_TEST_SUITE_P(Keys, GpuCodec, ::testing::ValuesIn(cuda_subjects(SIKV_KEY_CODEC)),
                         test_name);
INSTANTIATE_TEST_SUITE_P(Values, GpuCodec, ::testing::ValuesIn(cuda_subjects(SIKV_VALUE_CODEC)),
                         test_name);

// Bytes, tables and decoded rows of a small cache, for each head dimension.
TEST_P(GpuCodec, EqualsRefOnASmallCache) {
  const bool keys = variant().kind == SIKV_KEY_CODEC;
  for (const int head_dim : {64, 96, 128, 256}) {
    SCOPED_TRACE(head_dim);
    sikv_shape shape = make_shape(head_dim, SIKV_FP16);
    shape.max_tokens = 512;
    const CacheSpec spec{.head_dim = head_dim, .dtype = SIKV_FP16, .encoded = {512, 256}};
    CodecInstance codec = make_instance<CodecInstance>(variant(), {}, shape);
    CodecInstance ref = make_codec(variant().kind, variant().id, {}, shape);
    TestRows rows(spec.encoded, spec.num_kv_heads, head_dim, spec.dtype);
    rows.fill(Pattern::kOffset, 1);
    const sikv_layout layout = ref.describe();
    TestCache got(spec, keys ? layout : sikv_layout{}, keys ? sikv_layout{} : layout);
    TestCache want(spec, keys ? layout : sikv_layout{}, keys ? sikv_layout{} : layout);
    fit_and_encode(codec, rows, got);
    fit_and_encode(ref, rows, want);
    const Slots slots = {0, 7, 255, 100};
    for (int row = 0; row < got.num_rows(); ++row) {
      EXPECT_EQ(got.row_bytes(variant().kind, row), want.row_bytes(variant().kind, row)) << row;
      const std::vector<float> a = decode_slots(codec, got, row, slots);
      const std::vector<float> b = decode_slots(ref, want, row, slots);
      for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 4e-6 * (1 + std::fabs(b[i])));
    }
    EXPECT_EQ(got.damage(), "");
  }
}

// ---- selectors ----------------------------------------------------------------------------------

class GpuSelector : public VariantTest {
 protected:
  const Variant& ref() const { return find_variant(SIKV_SELECTOR, variant().id); }

  // Options worth a look of this selector: budgets, and what changes the kernels that run.
  std::vector<Choices> options() const {
    if (variant().id != "self_index") return {budget("1"), budget("37")};
    const auto with = [](Choices more, const char* budget) {
      more.emplace_back("tables", "6bit");
      more.emplace_back("budget", budget);
      return more;
    };
    return {with({}, "1"),
            with({}, "37"),
            with({}, "0.1"),
            with({{"rerank", "4"}}, "1"),
            with({{"rerank", "4"}}, "37"),
            with({{"rerank", "4"}, {"scan_every", "4"}, {"stagger", "true"}}, "37")};
  }
  Choices budget(const char* text) const {
    for (const sikv_option_spec& spec : variant().options) {
      if (std::string_view(spec.name) == "budget") return {{"budget", text}};
    }
    return {};
  }

  // Several steps of both variants: equal but for one slot at the cut.
  void expect_like_ref(const FilledCache& filled, const Case& c, int steps) {
    for (const Choices& choices : options()) {
      SCOPED_TRACE(describe(variant().id, choices));
      SelectorSession session(variant(), choices, filled, c.group);
      SelectorSession reference(ref(), choices, filled, c.group);
      ASSERT_EQ(session.accepted(), reference.accepted());
      if (!session.accepted()) continue;
      session.observe_everything();
      reference.observe_everything();
      for (int step = 0; step < steps; ++step) {
        SCOPED_TRACE("step " + std::to_string(step));
        expect_equal_but_for_the_cut(session.select(step), reference.select(step));
      }
    }
  }
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GpuSelector);
INSTANTIATE_TEST_SUITE_P(All, GpuSelector, ::testing::ValuesIn(cuda_subjects(SIKV_SELECTOR)),
                         test_name);

TEST_P(GpuSelector, EqualsRefOnASmallCache) {
  for_each_cache({small_case()},
                 [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c, 3); });
}

TEST_P(GpuSelector, TakesWideGroups) {
  for_each_cache(wide_groups(),
                 [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c, 3); });
}

TEST_P(GpuSelector, TakesABoundThatNoRowReaches) {
  for_each_cache({loosely_bounded()},
                 [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c, 3); });
}

TEST_P(GpuSelector, TakesHundredsOfRaggedSequences) {
  for_each_cache({ragged_batch(256, 2000, 4), ragged_batch(70, 20000, 2)},
                 [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c, 2); });
}

TEST_P(GpuSelector, TakesAMillionTokens) {
  for_each_cache(
      {a_million_tokens()},
      [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c, 1); },
      Pattern::kGaussian, kRotLm);
}

// Equal scores everywhere: the lowest slots win.
TEST_P(GpuSelector, BreaksTiesAsRefDoes) {
  for (const Pattern pattern : {Pattern::kConstant, Pattern::kZeros, Pattern::kSteps}) {
    SCOPED_TRACE(pattern_name(pattern));
    const Case c = make_case({1500, 40, 300}, {4, 0, 1}, 9, 2, 4, 128, SIKV_FP16);
    for_each_cache(
        {c},
        [&](const FilledCache& filled, const Case& c) {
          if (pattern == Pattern::kSteps) return expect_like_ref(filled, c, 2);
          for (const Choices& choices : options()) {
            SCOPED_TRACE(describe(variant().id, choices));
            SelectorSession session(variant(), choices, filled, c.group);
            SelectorSession reference(ref(), choices, filled, c.group);
            if (!session.accepted()) continue;
            session.observe_everything();
            reference.observe_everything();
            EXPECT_EQ(session.select(0), reference.select(0));
          }
        },
        pattern);
  }
}

// One graph, recorded once and launched for every step, answers what eager steps answer.
TEST_P(GpuSelector, RecordedStepsEqualEagerOnes) {
  const Case c = make_case({1000, 257, 3}, {5, 0, 1}, 9, 2, 4, 128, SIKV_FP16);
  for_each_cache({c}, [&](const FilledCache& filled, const Case& c) {
    for (const Choices& choices : options()) {
      SCOPED_TRACE(describe(variant().id, choices));
      SelectorSession eager(variant(), choices, filled, c.group);
      SelectorSession recorded(variant(), choices, filled, c.group);
      if (!eager.accepted()) continue;
      eager.observe_everything();
      recorded.observe_everything();
      std::vector<std::vector<uint8_t>> queries;
      for (uint64_t step = 0; step < 6; ++step) queries.push_back(make_queries(c, 50 + step));
      recorded.begin_step(0);
      DeviceCall call(gpu());
      const SelectorSession::Placed placed = recorded.place(call, queries[0]);
      void* const q = const_cast<void*>(placed.args.q);
      gpu().synchronize();
      const auto graph = gpu().record([&] { recorded.run(placed, call); });
      for (size_t step = 0; step < queries.size(); ++step) {
        if (step > 0) recorded.begin_step(static_cast<int64_t>(step));
        gpu().copy_in(q, queries[step].data(), queries[step].size());
        graph->replay();
        call.finish();
        EXPECT_EQ(recorded.collect(), eager.select(static_cast<int64_t>(step), queries[step]))
            << "step " << step;
      }
    }
  });
}

// One that does not read queries selects as ever, the very same.
TEST_P(GpuSelector, RefusesAQueryThatNoCacheTakesOrKeepsTheContract) {
  const Case c = make_case({300, 300}, {5, 0}, 3, 2, 4, 128, SIKV_BF16);
  for_each_cache({c}, [&](const FilledCache& filled, const Case& c) {
    for (const float x : {std::nanf(""), 3e38f, -HUGE_VALF}) {
      SelectorSession session(variant(), budget("37"), filled, c.group);
      if (!session.accepted()) return;
      session.observe_everything();
      std::vector<uint8_t> q = make_queries(c, 3);
      sikv_store(q.data(), c.cache.dtype, c.cache.head_dim + 77, x);  // of head 1
      try {
        const auto selected = session.select(0, q);
        SelectorSession other(variant(), budget("37"), filled, c.group);
        other.observe_everything();
        EXPECT_EQ(selected, other.select(0, make_queries(c, 3)));
      } catch (const Error& error) {
        const std::string said = error.what();
        EXPECT_TRUE(said.starts_with("Q is ")) << said;
        EXPECT_NE(said.find(" at layer 0, head 1, position"), said.npos) << said;
      }
    }
  });
}

// ---- kernels ------------------------------------------------------------------------------------

class GpuKernel : public VariantTest {
 protected:
  // Selections of every third open slot, fewer of a long row, or of everything.
  void choose(const FilledCache& filled, Guarded<int32_t>& slots, Guarded<int32_t>& counts,
              int capacity) const {
    const bool all = (variant().kernel().flags & SIKV_KERNEL_ATTENDS_ALL) != 0;
    for (int row = 0; row < filled.cache.num_rows(); ++row) {
      const Slots open = candidates(filled.cache, row);
      const size_t step = std::max<size_t>(3, open.size() / static_cast<size_t>(capacity) + 1);
      int count = 0;
      for (size_t i = 0; i < open.size(); i += step) {
        slots.data()[int64_t{row} * capacity + count++] = open[i];
      }
      counts.data()[row] = all || row % 5 == 4 ? SIKV_SELECT_ALL : count;
    }
  }

  struct Answer {
    std::vector<float> out, lse;
    bool operator==(const Answer& other) const {
      const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
        return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
      };
      return same(out, other.out) && same(lse, other.lse);
    }
  };
  // Of `variant`, eager or as a graph that is launched twice.
  Answer attend(const Variant& of, const FilledCache& filled, const Case& c,
                const std::vector<uint8_t>& q, bool record = false) const {
    constexpr int kCapacity = 700;
    KernelInstance kernel = make_instance<KernelInstance>(of, {}, shape_of(c));
    EXPECT_EQ(kernel.refusal(filled.key.describe(), filled.value.describe()), "");
    const auto rows = static_cast<size_t>(filled.cache.num_rows());
    Guarded<int32_t> slots(rows * kCapacity), counts(rows);
    choose(filled, slots, counts, kCapacity);
    const size_t heads = rows * static_cast<size_t>(c.group);
    Guarded<float> out(heads * static_cast<size_t>(c.cache.head_dim)), lse(heads);
    Workspace workspace(kernel.plan(kCapacity));
    DeviceCall call(device_of(of));
    const sikv_cache_view& view = call.view(filled.cache);
    const float scale = 1.0f / std::sqrt(static_cast<float>(c.cache.head_dim));
    const sikv_attend_args args{sizeof(sikv_attend_args),
                                view.num_kv_heads * c.group,
                                &view,
                                call.in(q),
                                scale,
                                0,
                                {call.out(slots), call.out(counts), kCapacity, 0},
                                call.out(out),
                                call.out(lse),
                                nullptr};
    void* const work = call.out(workspace);
    if (record) {
      gpu().synchronize();
      const auto graph = gpu().record([&] { kernel.run(args, work, call.stream()); });
      graph->replay();
      graph->replay();
      call.finish();
    } else {
      kernel.run(args, work, call.stream());
      call.finish();
    }
    EXPECT_TRUE(out.intact() && lse.intact() && workspace.intact());
    EXPECT_EQ(filled.cache.damage(), "");
    return {{out.data(), out.data() + out.size()}, {lse.data(), lse.data() + lse.size()}};
  }

  void expect_like_ref(const FilledCache& filled, const Case& c) const {
    const std::vector<uint8_t> q = make_queries(c, 3);
    const Answer got = attend(variant(), filled, c, q);
    const Answer want = attend(find_variant(SIKV_KERNEL, variant().id), filled, c, q);
    const auto dim = static_cast<size_t>(c.cache.head_dim);
    for (size_t head = 0; head < want.lse.size(); ++head) {
      if (std::isinf(want.lse[head])) {
        ASSERT_EQ(got.lse[head], want.lse[head]) << "head " << head;
      } else {
        ASSERT_NEAR(got.lse[head], want.lse[head], 1e-4) << "head " << head;
      }
      double error = 0, norm = 0;
      for (size_t i = head * dim; i < (head + 1) * dim; ++i) {
        error += (double{got.out[i]} - want.out[i]) * (double{got.out[i]} - want.out[i]);
        norm += double{want.out[i]} * want.out[i];
      }
      ASSERT_LE(std::sqrt(error), 1e-4 * std::sqrt(norm) + 1e-6) << "head " << head;
    }
  }

  template <typename Body>
  void for_each_read(const std::vector<Case>& cases, Body&& body,
                     const std::vector<CodecChoice>& codecs = kCodecs) const {
    const auto if_read = [&](const FilledCache& filled, const Case& c) {
      KernelInstance kernel = make_instance<KernelInstance>(variant(), {}, shape_of(c));
      if (kernel.refusal(filled.key.describe(), filled.value.describe()).empty()) body(filled, c);
    };
    for_each_cache(cases, if_read, Pattern::kGaussian, codecs);
  }
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GpuKernel);
INSTANTIATE_TEST_SUITE_P(All, GpuKernel, ::testing::ValuesIn(cuda_subjects(SIKV_KERNEL)),
                         test_name);

TEST_P(GpuKernel, EqualsRefOnASmallCache) {
  for_each_read({small_case()},
                [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c); });
}

TEST_P(GpuKernel, TakesWideGroups) {
  for_each_read(wide_groups(),
                [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c); });
}

TEST_P(GpuKernel, TakesABoundThatNoRowReaches) {
  for_each_read({loosely_bounded()},
                [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c); });
}

TEST_P(GpuKernel, TakesHundredsOfRaggedSequences) {
  for_each_read({ragged_batch(256, 2000, 4), ragged_batch(70, 20000, 2)},
                [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c); });
}

TEST_P(GpuKernel, TakesAMillionTokens) {
  if ((variant().kernel().flags & SIKV_KERNEL_ATTENDS_ALL) != 0) return;  // reads raw keys alone
  for_each_read(
      {a_million_tokens()},
      [&](const FilledCache& filled, const Case& c) { expect_like_ref(filled, c); }, kRotLm);
}

TEST_P(GpuKernel, AnswersTheSameBitsAgainAndRecorded) {
  const Case c = make_case({1900, 600, 3, 0}, {5, 0, 1, 7}, 9, 2, 4, 128, SIKV_FP16);
  for_each_read({c}, [&](const FilledCache& filled, const Case& c) {
    const std::vector<uint8_t> q = make_queries(c, 3);
    const Answer first = attend(variant(), filled, c, q);
    EXPECT_TRUE(attend(variant(), filled, c, q) == first);
    EXPECT_TRUE(attend(variant(), filled, c, q, true) == first) << "recorded";
  });
}

// With a selector that does not read it, the kernel is the only one to see a query.
TEST_P(GpuKernel, RefusesAQueryThatNoCacheTakes) {
  const Case c = make_case({300, 300}, {5, 0}, 3, 2, 4, 128, SIKV_BF16);
  for_each_read({c}, [&](const FilledCache& filled, const Case& c) {
    const int heads = c.cache.num_kv_heads * c.group, head = 6, channel = 77;
    for (const float x : {std::nanf(""), 3e38f, -HUGE_VALF}) {
      std::vector<uint8_t> q = make_queries(c, 3);
      sikv_store(q.data(), c.cache.dtype, (int64_t{heads} + head) * c.cache.head_dim + channel, x);
      try {
        attend(variant(), filled, c, q);
        FAIL() << "took " << x;
      } catch (const Error& error) {
        const std::string said = error.what();
        EXPECT_TRUE(said.starts_with("Q is ")) << said;
        EXPECT_NE(said.find(" at layer 0, head 6, position"), said.npos) << said;
        EXPECT_NE(said.find("sequence 1"), said.npos) << said;
      }
    }
  });
}

}  // namespace
}  // namespace sikv::testing
