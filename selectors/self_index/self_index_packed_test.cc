// Packing and packed logits of every SIMD target this machine runs, against the scalar layout.
#include "selectors/self_index/self_index_packed.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "hwy/aligned_allocator.h"
#include "hwy/targets.h"
#include "kernels/common/simd_attention.h"
#include "kernels/common/stored_rows.h"
#include "plugins/layouts/rlm4_v1.h"

namespace sikv::self_index {
namespace {

// Rows of rlm4 keys in one page, as the codec writes them.
class Keys {
 public:
  Keys(int bits, int head_dim, std::mt19937& random)
      : params_{head_dim, bits},
        index_(static_cast<size_t>(nibble_tile::plane_bytes(head_dim, SIKV_PAGE_TOKENS))),
        magnitude_(static_cast<size_t>(rlm4::magnitude_bytes(params_)) * SIKV_PAGE_TOKENS),
        scale_(size_t{rlm4::kScaleBytes} * SIKV_PAGE_TOKENS) {
    std::normal_distribution<float> normal;
    const std::vector<float> mean(static_cast<size_t>(head_dim));
    std::vector<float> key(mean.size());
    for (int t = 0; t < SIKV_PAGE_TOKENS; ++t) {
      for (float& x : key) x = normal(random);
      rlm4::pack_1(params_, page(), t, mean.data(), key.data());
    }
  }

  RowSource source() {
    RowSource source{stored::offset(RowFormat::kSigned1, params_.bits - 2)};
    source.code = {magnitude_.data(), 0, rlm4::magnitude_bytes(params_)};
    source.sign = {index_.data(), 0, rlm4::index_tile_bytes(params_)};
    source.scale = {scale_.data(), 0, rlm4::kScaleBytes};
    return source;
  }
  std::vector<float> row(int slot) {
    std::vector<float> y(static_cast<size_t>(params_.head_dim));
    rlm4::unpack_rotated_1(params_, page(), slot, y.data());
    return y;
  }

 private:
  rlm4::KeyPage page() { return {index_.data(), magnitude_.data(), scale_.data()}; }

  rlm4::Params params_;
  std::vector<uint8_t> index_, magnitude_, scale_;
};

class PackedTest : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
};

TEST_P(PackedTest, LogitsAreThoseOfTheStoredKeys) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  int cases = 0;
  for (int head_dim : {64, 96, 128, 256}) {
    for (int bits : {2, 3, 4}) {
      const int group = cases++ % 9 + 1, count = 1 + static_cast<int>(random() % 200);
      SCOPED_TRACE("D " + std::to_string(head_dim) + ", bits " + std::to_string(bits) + ", G " +
                   std::to_string(group) + ", " + std::to_string(count) + " candidates");
      Keys keys(bits, head_dim, random);
      std::vector<int32_t> slots(SIKV_PAGE_TOKENS);
      std::iota(slots.begin(), slots.end(), 0);
      std::shuffle(slots.begin(), slots.end(), random);
      slots.resize(static_cast<size_t>(count));
      PackedKeys packed;
      simd_pack(keys.source(), slots, head_dim, packed);
      ASSERT_EQ(packed.count, count);

      const auto aligned = hwy::AllocateAligned<float>(static_cast<size_t>(PaddedHeads(group)) *
                                                       static_cast<size_t>(head_dim));
      std::fill_n(aligned.get(), PaddedHeads(group) * head_dim, 0.0f);
      for (int i = 0; i < group * head_dim; ++i) aligned[static_cast<size_t>(i)] = normal(random);
      std::vector<float> shift;
      for (int g = 0; g < group; ++g) shift.push_back(normal(random));
      std::vector<float> logits(static_cast<size_t>(group * count), NAN);
      simd_packed_logits(packed, group, aligned.get(), shift.data(), logits.data(), count);
      for (int t = 0; t < count; ++t) {
        const std::vector<float> row = keys.row(slots[static_cast<size_t>(t)]);
        for (int g = 0; g < group; ++g) {
          const float* q = aligned.get() + g * head_dim;
          const double want =
              std::inner_product(row.begin(), row.end(), q, double{shift[static_cast<size_t>(g)]});
          ASSERT_NEAR(logits[static_cast<size_t>(g * count + t)], want, 2e-4)
              << t << ", head " << g;
        }
      }
    }
  }
}

TEST_P(PackedTest, NothingPackedNeedsNothing) {
  simd_packed_logits(PackedKeys(), 4, nullptr, nullptr, nullptr, 0);
}

std::vector<int64_t> vector_targets() {
  std::vector<int64_t> targets;
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (target != HWY_SCALAR) targets.push_back(target);
  }
  return targets;
}
INSTANTIATE_TEST_SUITE_P(Targets, PackedTest, ::testing::ValuesIn(vector_targets()),
                         [](const auto& info) { return std::string(hwy::TargetName(info.param)); });

}  // namespace
}  // namespace sikv::self_index
