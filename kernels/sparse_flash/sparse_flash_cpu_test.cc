// The `cpu` variant on every target that this machine runs, not only its best one, against `ref`:
// each format that SIMD code reads, the ones it leaves to scalar unpacking, and every way heads and
// rows are taken together. The conformance suite does the rest, on the best target.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "hwy/highway.h"
#include "kernels/common/flash_cpu.h"
#include "kernels/sparse_flash/sparse_flash.h"
#include "plugins/layouts/rotation.h"
#include "tests/support/queries.h"

namespace sikv::sparse_flash {
namespace {

using testing::Choices;

struct Codecs {
  std::string key;
  Choices key_choices;
  std::string value;
  Choices value_choices;
};

const Codecs kCodecs[] = {
    {"sign_vq", {}, "intq", {}},
    {"sign_vq", {{"scale_group", "64"}}, "intq", {{"scale_group", "64"}}},
    {"sign_vq", {{"scale_type", "fp8_e4m3"}}, "intq", {{"scale_type", "fp8_e5m2"}}},
    {"sign_vq", {{"magnitude_bits", "16"}}, "intq", {{"bits", "16"}}},
    {"sign_vq", {{"magnitude_bits", "3"}}, "intq", {{"bits", "4"}}},
    {"rot_lm", {{"bits", "2"}}, "rot_lm", {{"bits", "2"}}},
    {"rot_lm", {{"bits", "3"}}, "rot_lm", {{"bits", "3"}}},
    {"rot_lm", {{"bits", "4"}}, "rot_lm", {{"bits", "4"}}},
    {"fp16", {}, "fp16", {}},
    {"kivi", {}, "kivi", {}},
};

class SparseFlashTargets : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
};

struct Output {
  std::vector<float> out, lse;
};

Output attend(std::unique_ptr<Kernel> (*make)(const CreateArgs&),
              const testing::FilledCache& filled, int group, const sikv_selection& selection,
              const std::vector<uint8_t>& q) {
  const sikv_cache_view& view = filled.cache.view();
  const sikv_shape shape = testing::tight_shape(filled.cache.spec(), group);
  Device& device = testing::cpu(3);
  const sikv_create_args created{sizeof created, 0,       nullptr, &shape, &device.info(),
                                 &device.host(), nullptr, nullptr};
  const auto kernel = make(CreateArgs(created));
  std::vector<uint8_t> workspace(kernel->plan(selection.capacity));
  const auto heads = static_cast<size_t>(filled.cache.num_rows() * group);
  Output output{std::vector<float>(heads * static_cast<size_t>(view.head_dim)),
                std::vector<float>(heads)};
  const sikv_attend_args args{sizeof args,
                              view.num_kv_heads * group,
                              &view,
                              q.data(),
                              1.0f / std::sqrt(static_cast<float>(view.head_dim)),
                              0,
                              selection,
                              output.out.data(),
                              output.lse.data(),
                              nullptr};
  kernel->run(args, CacheView(view), {workspace.data(), nullptr});
  return output;
}

// Both sum in fp32, ref one by one, up to 700 tokens of 256 channels: 1e-5 is some 80 roundings of
// the largest number.
void expect_close(const std::vector<float>& got, const std::vector<float>& expected) {
  float largest = 0.0f;
  for (const float x : expected) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], expected[i], 1e-5f * largest) << i;
}

TEST_P(SparseFlashTargets, AnswerAsRef) {
  struct Shape {
    int head_dim, group;
    int32_t dtype;
  };
  constexpr Shape kShapes[] = {{64, 1, SIKV_FP16},
                               {96, 3, SIKV_BF16},
                               {128, 4, SIKV_FP16},
                               {256, 2, SIKV_FP32},
                               {128, 9, SIKV_BF16}};
  for (const Codecs& codecs : kCodecs) {
    for (const Shape& s : kShapes) {
      if (s.head_dim == 96 && codecs.value_choices == Choices{{"scale_group", "64"}}) continue;
      SCOPED_TRACE(testing::describe(codecs.key, codecs.key_choices) + "+" +
                   testing::describe(codecs.value, codecs.value_choices) + ", D " +
                   std::to_string(s.head_dim) + ", G " + std::to_string(s.group));
      const testing::CacheSpec spec{.num_kv_heads = 2,
                                    .head_dim = s.head_dim,
                                    .dtype = s.dtype,
                                    .encoded = {700, 33},
                                    .tail = {5, 40},
                                    .pinned = 7};
      const sikv_shape shape = testing::tight_shape(spec, s.group);
      const testing::FilledCache filled(
          spec, testing::make_codec(SIKV_KEY_CODEC, codecs.key, codecs.key_choices, shape),
          testing::make_codec(SIKV_VALUE_CODEC, codecs.value, codecs.value_choices, shape));
      const auto q = testing::gaussian_queries(spec, s.group, 1, 3);
      // Row 0 selects everything, row 1 every third slot, row 2 one, row 3 none.
      const sikv_cache_view& view = filled.cache.view();
      constexpr int kCapacity = 300;
      std::vector<int32_t> slots(4 * kCapacity), counts = {SIKV_SELECT_ALL, 0, 0, 0};
      for (int row = 1; row < 3; ++row) {
        const std::span<const int32_t> pinned = CacheView(view).pinned_slots(row);
        for (int32_t slot = 0; slot < view.encoded_len[row]; slot += row == 1 ? 3 : 40) {
          if (std::binary_search(pinned.begin(), pinned.end(), slot)) continue;
          slots[static_cast<size_t>(row * kCapacity + counts[static_cast<size_t>(row)]++)] = slot;
        }
      }
      const sikv_selection selection{slots.data(), counts.data(), kCapacity, 0};
      const Output expected = attend(make_ref, filled, s.group, selection, q);
      const Output got = attend(make_cpu, filled, s.group, selection, q);
      expect_close(got.out, expected.out);
      expect_close(got.lse, expected.lse);
    }
  }
}

TEST_P(SparseFlashTargets, RotateBitByBit) {
  for (const int head_dim : {64, 96, 128, 256}) {
    std::vector<float> x(static_cast<size_t>(head_dim));
    for (int d = 0; d < head_dim; ++d) x[static_cast<size_t>(d)] = std::sin(1.0f + 3.0f * d);
    std::vector<float> expected = x, got = x;
    rotation::forward(expected.data(), head_dim);
    flash_simd()->rotate(x.size(), got.data());
    EXPECT_EQ(got, expected);
    rotation::inverse(expected.data(), head_dim);
    flash_simd()->unrotate(x.size(), got.data());
    EXPECT_EQ(got, expected);
  }
}

std::vector<int64_t> targets() {
  std::vector<int64_t> targets;
  for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS & ~HWY_SCALAR; left != 0;
       left &= left - 1) {
    targets.push_back(left & -left);
  }
  return targets;
}

INSTANTIATE_TEST_SUITE_P(Targets, SparseFlashTargets, ::testing::ValuesIn(targets()),
                         [](const auto& info) { return std::string(hwy::TargetName(info.param)); });

}  // namespace
}  // namespace sikv::sparse_flash
