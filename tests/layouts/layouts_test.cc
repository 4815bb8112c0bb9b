// The shared pieces of the layouts, and that what codecs describe is what readers compute.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "framework/base/random.h"
#include "plugins/layouts/intq_v1.h"
#include "plugins/layouts/kivi_v1.h"
#include "plugins/layouts/kvquant_v1.h"
#include "plugins/layouts/paged_sum.h"
#include "plugins/layouts/polar_v1.h"
#include "plugins/layouts/qjl_v1.h"
#include "plugins/layouts/rlm4_v1.h"
#include "plugins/layouts/sign4_v1.h"
#include "plugins/layouts/turbo_v1.h"
#include "plugins/sdk/view.h"
#include "tests/support/plugins.h"

namespace sikv::testing {
namespace {

TEST(NibbleTileTest, Token0IsInTheLowestNibbleOfItsWord) {
  uint8_t page[2 * 64] = {};
  nibble_tile::set(page, 64, 0, 1, 0x5);
  nibble_tile::set(page, 64, 7, 1, 0xa);
  nibble_tile::set(page, 64, 9, 15, 0xc);  // second tile, word 15, token 1
  uint32_t word;
  std::memcpy(&word, page + 4, sizeof word);
  EXPECT_EQ(word, 0xa0000005u);
  std::memcpy(&word, page + 64 + 60, sizeof word);
  EXPECT_EQ(word, 0x000000c0u);
  EXPECT_EQ(nibble_tile::get(page, 64, 9, 15), 0xcu);
  EXPECT_EQ(nibble_tile::get_sign(page, 64, 9, 62), 1u);
  EXPECT_EQ(nibble_tile::get_sign(page, 64, 9, 61), 0u);
}

TEST(NibbleTileTest, SetLeavesTheOtherNibbleAlone) {
  uint8_t page[64];
  std::fill_n(page, 64, 0xa5);
  nibble_tile::set(page, 64, 2, 0, 0x3);
  EXPECT_EQ(page[1], 0xa3);
  nibble_tile::set(page, 64, 3, 0, 0x0);
  EXPECT_EQ(page[1], 0x03);
}

TEST(NibbleTileTest, SignsOfAGroup) {
  const float x[] = {-1.0f, 0.0f, -0.0f, -1e-45f};
  EXPECT_EQ(nibble_tile::nibble_of(x), 0b0110u);
}

TEST(BitpackTest, IsAStreamOfBitsLowestFirst) {
  Random random(1);
  for (int bits = 1; bits <= 8; ++bits) {
    constexpr int kCount = 64;
    const int bytes = bitpack::row_bytes(bits, kCount);
    std::vector<uint8_t> row(static_cast<size_t>(bytes) + 1, 0xa5);
    std::vector<uint32_t> codes(kCount);
    for (int pass = 0; pass < 2; ++pass) {  // the second one overwrites codes, not poison
      for (int i = kCount - 1; i >= 0; --i) {
        codes[static_cast<size_t>(i)] = static_cast<uint32_t>(random.below(1u << bits));
        bitpack::set(row.data(), bits, i, codes[static_cast<size_t>(i)]);
      }
    }
    EXPECT_EQ(row.back(), 0xa5);
    for (int i = 0; i < kCount; ++i) {
      uint32_t expected = 0;
      for (int b = 0; b < bits; ++b) {
        const int at = bits * i + b;
        expected |= static_cast<uint32_t>(row[static_cast<size_t>(at / 8)] >> (at % 8) & 1) << b;
      }
      EXPECT_EQ(codes[static_cast<size_t>(i)], expected) << bits << " " << i;
      EXPECT_EQ(bitpack::get(row.data(), bits, i), expected) << bits << " " << i;
    }
  }
}

// Comparisons may prefer either zero; the bytes must not show which.
TEST(MinmaxTest, ZerosOfBothSignsStoreTheSameBytes) {
  std::vector<float> x(32, 0.0f);
  x[3] = x[17] = -0.0f;
  std::vector<uint8_t> codes(8), scales(4, 0xff), swapped(4, 0xff);
  minmax::pack_row(x.data(), 32, 2, 32, SIKV_FP16, codes.data(), scales.data());
  std::reverse(x.begin(), x.end());
  for (float& value : x) value = -value;
  minmax::pack_row(x.data(), 32, 2, 32, SIKV_FP16, codes.data(), swapped.data());
  EXPECT_EQ(scales, std::vector<uint8_t>(4, 0));
  EXPECT_EQ(swapped, scales);
}

TEST(MinmaxTest, ARangeThatTheScaleTypeRoundsAwayGivesCode0) {
  std::vector<float> x(32, 1.0f);
  x[3] = 1.001f;  // scale 0.00033, below half of 2^-9
  std::vector<uint8_t> scales(2), codes(8, 0xff);
  minmax::pack_row(x.data(), 32, 2, 32, SIKV_FP8_E4M3, codes.data(), scales.data());
  EXPECT_EQ(codes, std::vector<uint8_t>(8, 0));
  minmax::unpack_row(codes.data(), scales.data(), 32, 2, 32, SIKV_FP8_E4M3, x.data());
  EXPECT_EQ(x[3], 1.0f);
}

TEST(ArithmeticTest, SumsFoldHalves) {
  // 96 = 3 * 2^5: ((x0 + x48) + (x24 + x72)) ... and then three numbers from the left.
  float x[96];
  for (int i = 0; i < 96; ++i) x[i] = static_cast<float>(i);
  EXPECT_EQ(sum_folded(x, 96), 95.0f * 96 / 2);
  float cancelling[4] = {1e8f, 1.0f, -1e8f, 1.0f};  // from the left the first 1 would be lost
  EXPECT_EQ(sum_folded(cancelling, 4), 2.0f);
}

TEST(PagedSumTest, AddsRunsOf256) {
  PagedSum sum(1);
  double expected = 0, run = 0;
  Random random(3);
  for (int t = 0; t < 600; ++t) {
    if (t % 256 == 0) {
      expected += run;
      run = 0;
    }
    const float x = static_cast<float>(random.normal());
    sum.begin_token();
    sum.add(0, x);
    run += x;
  }
  EXPECT_EQ(sum.finish()[0], expected + run);
  EXPECT_EQ(sum.tokens(), 600);
}

// Sizes a reader computes from the printed parameters, in the order of the planes.
std::vector<int> sizes_for(const LayoutView& layout) {
  std::vector<int> sizes;
  const auto add = [&](int bytes) {
    if (bytes != 0) sizes.push_back(bytes);
  };
  if (layout.is(sign4::kFamily, sign4::kVersion)) {
    const sign4::Params p = sign4::read_params(layout);
    add(sign4::index_tile_bytes(p)), add(sign4::magnitude_bytes(p)), add(sign4::scale_bytes(p));
  } else if (layout.is(rlm4::kKeyFamily, rlm4::kVersion)) {
    const rlm4::Params p = rlm4::read_params(layout);
    add(rlm4::index_tile_bytes(p)), add(rlm4::magnitude_bytes(p)), add(rlm4::kScaleBytes);
  } else if (layout.is(rlm4::kKeyLineFamily, rlm4::kVersion)) {
    const rlm4::Params p = rlm4::read_params(layout);
    add(rlm4::index_tile_bytes(p)), add(rlm4::line_key_scale(p.head_dim)), add(rlm4::kScaleBytes);
  } else if (rlm4::is_values(layout)) {
    add(rlm4::value_code_bytes(rlm4::read_params(layout))), add(rlm4::kScaleBytes);
  } else if (layout.is(kivi::kFamily, kivi::kVersion)) {
    const kivi::Params p = kivi::read_params(layout);
    add(kivi::magnitude_bytes(p)), add(kivi::scale_tile_bytes(p));
  } else if (layout.is(kvquant::kKeyFamily, kvquant::kVersion)) {
    const kvquant::Params p = kvquant::read_params(layout);
    add(kvquant::code_bytes(p)), add(kvquant::key_scale_bytes(p));
  } else if (layout.is(kvquant::kValueFamily, kvquant::kVersion)) {
    const kvquant::Params p = kvquant::read_params(layout);
    add(kvquant::code_bytes(p)), add(kvquant::value_scale_bytes(p));
  } else if (layout.is(polar::kKeyFamily, polar::kVersion) ||
             layout.is(polar::kValueFamily, polar::kVersion)) {
    const polar::Params p = polar::read_params(layout);
    add(polar::code_bytes(p)), add(polar::scale_bytes(p));
  } else if (layout.is(turbo::kKeyFamily, turbo::kVersion) ||
             layout.is(turbo::kValueFamily, turbo::kVersion)) {
    const turbo::Params p = turbo::read_params(layout);
    add(turbo::code_bytes(p)), add(turbo::scale_bytes(p));
  } else if (layout.is(qjl::kFamily, qjl::kVersion)) {
    add(qjl::sign_bytes(qjl::read_params(layout))), add(qjl::kScaleBytes);
  } else if (layout.is(raw::kFamily, raw::kVersion)) {
    add(raw::row_bytes(raw::read_params(layout)));
  } else {
    EXPECT_TRUE(layout.is(intq::kFamily, 1) || layout.is(intq::kKiviFamily, 1)) << layout.family();
    const intq::Params p = intq::read_params(layout);
    add(intq::code_bytes(p)), add(intq::scale_bytes(p));
  }
  return sizes;
}

TEST(LayoutsTest, ReadersComputeTheSizesThatCodecsDescribe) {
  int layouts = 0;
  for (const Variant& variant : registry().variants()) {
    if (variant.kind != SIKV_KEY_CODEC && variant.kind != SIKV_VALUE_CODEC) continue;
    if (variant.variant != "ref") continue;
    for (const Choices& choices : single_choices(variant)) {
      for (const int32_t dtype : {SIKV_FP32, SIKV_BF16}) {
        SCOPED_TRACE(describe(variant.id, choices));
        const CodecInstance codec =
            make_instance<CodecInstance>(variant, choices, make_shape(128, dtype));
        const sikv_layout layout = codec.describe();
        std::vector<int> described;
        for (uint32_t i = 0; i < layout.num_planes; ++i) {
          described.push_back(static_cast<int>(layout.planes[i].bytes_per_tile));
        }
        EXPECT_EQ(described, sizes_for(LayoutView(layout)));
        ++layouts;
      }
    }
  }
  EXPECT_GT(layouts, 40);
}

}  // namespace
}  // namespace sikv::testing
