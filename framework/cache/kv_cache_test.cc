#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "framework/base/error.h"
#include "framework/cache/kv_cache.h"

namespace sikv {
namespace {

constexpr int kHeads = 2, kDim = 64;

sikv_shape shape(int layers, int batch, int max_tokens) {
  return {sizeof(sikv_shape), layers, 4, kHeads, kDim, SIKV_FP16, batch, max_tokens, 10000.0};
}

sikv_layout layout(std::initializer_list<sikv_plane> planes) {
  sikv_layout layout{};
  layout.struct_size = sizeof layout;
  layout.version = 1;
  layout.head_dim = kDim;
  for (const sikv_plane& plane : planes) layout.planes[layout.num_planes++] = plane;
  return layout;
}

const sikv_plane kNibbles = {SIKV_INDEX_CODE, SIKV_NIBBLE_TILES, 8, kDim};
const sikv_plane kBytes = {SIKV_MAGNITUDE, SIKV_PER_TOKEN, 1, 4};
const sikv_plane kValues = {SIKV_VALUE_CODE, SIKV_PER_TOKEN, 1, 16};
const sikv_plane kShared = {SIKV_SCALE, SIKV_SHARED, 32, 8};

class KvCacheTest : public testing::Test {
 protected:
  std::unique_ptr<Device> device_ = open_cpu_device(1);

  KvCache make(const sikv_layout& key, int layers = 1, int batch = 1, int max_tokens = 1024) {
    return KvCache(*device_, shape(layers, batch, max_tokens), {key, nullptr, nullptr},
                   {layout({kValues}), nullptr, nullptr}, {});
  }
  // Lines of 12 bytes: 4 of keys, 2 of their scales, 2 of the values' and 4 of padding.
  KvCache make_with_lines() {
    sikv_layout key =
        layout({kNibbles, {SIKV_MAGNITUDE, SIKV_IN_LINE, 1, 4}, {SIKV_SCALE, SIKV_IN_LINE, 1, 2}});
    key.line_bytes = 12;
    key.line_offset[2] = 4;
    sikv_layout value = layout({kValues, {SIKV_VALUE_SCALE, SIKV_IN_LINE, 1, 2}});
    value.line_bytes = 12;
    value.line_offset[1] = 6;
    return KvCache(*device_, shape(1, 1, 1024), {key, nullptr, nullptr}, {value, nullptr, nullptr},
                   {});
  }
  static uint8_t* token(const sikv_cache_view& view, const sikv_store_view& store, int plane,
                        int row, int slot, int bytes) {
    const int64_t page = view.page_table[row * view.max_pages + slot / 256];
    return static_cast<uint8_t*>(store.planes[plane]) + page * store.page_stride_bytes[plane] +
           slot % 256 * bytes;
  }
};

TEST_F(KvCacheTest, PagesOfARowAreConsecutiveAndComeBack) {
  KvCache cache = make(layout({kBytes}), 2, 2);
  for (int layer = 0; layer < 2; ++layer) {
    for (int row = 0; row < 4; ++row) EXPECT_EQ(cache.extend(layer, row, 512), 0);
  }
  EXPECT_EQ(cache.pages_in_use(), 16);
  const sikv_cache_view view = cache.view(1);
  for (int row = 0; row < 4; ++row) {
    EXPECT_EQ(view.page_table[row * view.max_pages + 1], view.page_table[row * view.max_pages] + 1);
  }
  EXPECT_EQ(cache.extend(0, 3, 256), 512);
  cache.clear(1);
  EXPECT_EQ(cache.pages_in_use(), 8);
  EXPECT_EQ(cache.encoded_len(0, 3), 0);
  EXPECT_EQ(cache.encoded_len(0, 0), 512);
}

TEST_F(KvCacheTest, LedgerCountsWhatTheLayoutsSay) {
  KvCache cache = make(layout({kNibbles, kBytes}));
  cache.extend(0, 0, 256);
  cache.extend(0, 1, 512);
  const Ledger ledger = cache.ledger();
  EXPECT_EQ(ledger.bytes("index_code"), 3u * 256 * kDim / 8);
  EXPECT_EQ(ledger.bytes("magnitude"), 3u * 256 * 4);
  EXPECT_EQ(ledger.bytes("value_code"), 3u * 256 * 16);
  EXPECT_EQ(ledger.bytes("tail"), 2u * 256 * kHeads * kDim * 2);
  EXPECT_DOUBLE_EQ(cache.bytes_per_token(), kDim / 8 + 4 + 16);
}

TEST_F(KvCacheTest, LedgerCountsEachByteOfALineOnce) {
  KvCache cache = make_with_lines();
  cache.extend(0, 0, 256);
  const Ledger ledger = cache.ledger();
  EXPECT_EQ(ledger.bytes("magnitude"), 256u * 4);
  EXPECT_EQ(ledger.bytes("scale"), 256u * 2);
  EXPECT_EQ(ledger.bytes("value_code"), 256u * 16);
  EXPECT_EQ(ledger.bytes("value_scale"), 256u * 2);
  EXPECT_EQ(ledger.bytes("line_padding"), 256u * 4);
  EXPECT_DOUBLE_EQ(cache.bytes_per_token(), kDim / 8 + 12 + 16);
}

TEST_F(KvCacheTest, PlanesInLinesLieInTheSameMemoryAndMoveWithTheirTokens) {
  KvCache cache = make_with_lines();
  cache.extend(0, 0, 512);
  sikv_cache_view view = cache.view(0);
  EXPECT_EQ(static_cast<uint8_t*>(view.key.planes[2]) - static_cast<uint8_t*>(view.key.planes[1]),
            4);
  EXPECT_EQ(static_cast<uint8_t*>(view.value.planes[1]) - static_cast<uint8_t*>(view.key.planes[1]),
            6);
  EXPECT_EQ(view.value.page_stride_bytes[1], 256 * 12);
  for (int slot = 0; slot < 512; ++slot) {
    *token(view, view.key, 1, 0, slot, 12) = static_cast<uint8_t>(slot);
    *token(view, view.key, 2, 0, slot, 12) = static_cast<uint8_t>(slot * 3);
    *token(view, view.value, 1, 0, slot, 12) = static_cast<uint8_t>(slot * 5);
  }
  std::vector<int32_t> keep;
  for (int slot = 1; slot < 512; slot += 3) keep.push_back(slot);
  cache.evict(0, 0, keep);
  view = cache.view(0);
  for (size_t i = 0; i < keep.size(); ++i) {
    const int slot = static_cast<int>(i);
    EXPECT_EQ(*token(view, view.key, 1, 0, slot, 12), static_cast<uint8_t>(keep[i]));
    EXPECT_EQ(*token(view, view.key, 2, 0, slot, 12), static_cast<uint8_t>(keep[i] * 3));
    EXPECT_EQ(*token(view, view.value, 1, 0, slot, 12), static_cast<uint8_t>(keep[i] * 5));
  }
}

TEST(LineConflictTest, SaysWhyValuesFindNoPlaceInTheLinesOfTheKeys) {
  sikv_layout key = layout({{SIKV_MAGNITUDE, SIKV_IN_LINE, 1, 4}});
  key.line_bytes = 12;
  sikv_layout value = layout({{SIKV_VALUE_SCALE, SIKV_IN_LINE, 1, 2}});
  value.line_bytes = 12;
  value.line_offset[0] = 4;
  EXPECT_EQ(line_conflict(key, value), "");
  EXPECT_EQ(line_conflict(key, layout({kValues})), "");
  value.line_offset[0] = 3;
  EXPECT_EQ(line_conflict(key, value), "which has bytes 0 to 3 of a line in use");
  value.line_bytes = 16;
  EXPECT_EQ(line_conflict(key, value), "whose lines have 12 bytes and not 16");
  EXPECT_EQ(line_conflict(layout({kBytes}), value), "which has no lines");
}

TEST_F(KvCacheTest, AFullTailIsFlushedAsItWasAppended) {
  KvCache cache = make(layout({kBytes}), 1, 2);
  constexpr size_t kToken = kHeads * kDim;
  // Prompts of 1 and 254 tokens, then 2 more each.
  std::vector<uint16_t> prompt(255 * kToken);
  std::iota(prompt.begin(), prompt.end(), uint16_t{0});
  const std::vector<int32_t> first = {0, 1}, count = {1, 254};
  const sikv_rows rows{prompt.data(), SIKV_FP16, 254, first.data(), count.data(), kToken, kDim};
  cache.fill_tails(0, rows, rows, count.data());
  std::vector<uint16_t> k(2 * kToken), v(2 * kToken);
  for (uint16_t t = 0; t < 2; ++t) {
    EXPECT_FALSE(cache.flush_due(0));
    std::iota(k.begin(), k.end(), static_cast<uint16_t>(1000 * t));
    std::iota(v.begin(), v.end(), static_cast<uint16_t>(500 + 1000 * t));
    cache.append(0, k.data(), v.data());
  }
  EXPECT_TRUE(cache.flush_due(0));
  cache.reserve_flush(0);
  EXPECT_EQ(cache.pages_in_use(), kHeads);
  const auto flush = cache.begin_flush(0);
  EXPECT_EQ(flush.k.count[0], 0);
  EXPECT_EQ(flush.k.count[1], 256);
  EXPECT_EQ(flush.first_slot[kHeads], 0);
  EXPECT_EQ(cache.encoded_len(0, kHeads), 256);
  const auto value = [&](const sikv_rows& from, int t, int h, int d) {
    return static_cast<const uint16_t*>(
        from.data)[(from.first[1] + t) * from.token_stride + h * from.head_stride + d];
  };
  EXPECT_EQ(value(flush.k, 253, 0, 3), static_cast<uint16_t>(254 * kToken + 3));
  EXPECT_EQ(value(flush.v, 255, 1, 5), 500 + 1000 + kToken + kDim + 5);
  cache.end_flush(0);
  EXPECT_EQ(cache.tail_len(0, 0), 3);
  EXPECT_EQ(cache.tail_len(0, 1), 0);
}

TEST_F(KvCacheTest, GrowingPastThePlanNamesTheLimit) {
  KvCache cache = make(layout({kBytes}), 1, 1, 300);
  cache.extend(0, 0, 256);
  try {
    cache.extend(0, 0, 256);
    FAIL() << "expected an Error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "sequence 0 of the batch would hold 512 tokens, but the cache was planned for "
                 "max_tokens 300: raise it or shorten the run");
  }
}

TEST_F(KvCacheTest, PromptsThatDisagreeWithTheirPagesAreRefused) {
  KvCache cache = make(layout({kBytes}), 1, 2);
  const std::vector<uint16_t> prompt(900 * kHeads * kDim);
  const std::vector<int32_t> first = {0, 300}, count = {300, 600};
  const sikv_rows rows{prompt.data(), SIKV_FP16,     600, first.data(),
                       count.data(),  kHeads * kDim, kDim};
  for (const int row : {0, 1, 2, 3}) cache.extend(0, row, 256);
  try {
    cache.fill_tails(0, rows, rows, count.data());
    FAIL() << "expected an Error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "the prompt of sequence 1 has 600 tokens, but layer 0, KV head 0 has pages for "
                 "256 where its whole pages are 512: extend every row by exactly those");
  }
  EXPECT_EQ(cache.tail_len(0, 0), 0);
  for (const int row : {2, 3}) cache.extend(0, row, 256);
  cache.fill_tails(0, rows, rows, count.data());
  EXPECT_EQ(cache.tail_len(0, 0), 44);
  EXPECT_EQ(cache.tail_len(0, 1), 88);
}

TEST_F(KvCacheTest, EvictionMovesTokensFreesPagesAndRemembersPositions) {
  KvCache cache = make(layout({kNibbles, kBytes}));
  cache.extend(0, 0, 768);
  {
    const sikv_cache_view view = cache.view(0);
    for (int slot = 0; slot < 768; ++slot) {
      *token(view, view.key, 1, 0, slot, 4) = static_cast<uint8_t>(slot * 7);
      // Group 3's nibble of every token.
      uint8_t* tile = static_cast<uint8_t*>(view.key.planes[0]) +
                      view.page_table[slot / 256] * view.key.page_stride_bytes[0] +
                      slot % 256 / 8 * kDim;
      tile[3 * 4 + slot % 8 / 2] |= static_cast<uint8_t>((slot * 5 % 16) << (slot % 2 * 4));
    }
  }
  std::vector<int32_t> keep;
  for (int slot = 5; slot < 768; slot += 3) keep.push_back(slot);
  cache.evict(0, 0, keep);
  EXPECT_EQ(cache.pages_in_use(), 1);
  EXPECT_EQ(cache.encoded_len(0, 0), static_cast<int>(keep.size()));
  EXPECT_DOUBLE_EQ(cache.bytes_per_token() * 768,
                   cache.bytes_per_stored_token() * static_cast<double>(keep.size()));
  sikv_cache_view view = cache.view(0);
  for (size_t i = 0; i < keep.size(); ++i) {
    const int slot = static_cast<int>(i);
    EXPECT_EQ(view.positions[i], keep[i]);
    EXPECT_EQ(*token(view, view.key, 1, 0, slot, 4), static_cast<uint8_t>(keep[i] * 7));
    const uint8_t* tile = static_cast<uint8_t*>(view.key.planes[0]) +
                          view.page_table[0] * view.key.page_stride_bytes[0] + slot / 8 * kDim;
    EXPECT_EQ(tile[3 * 4 + slot % 8 / 2] >> (slot % 2 * 4) & 0xf, keep[i] * 5 % 16);
  }
  // New tokens continue after the last position there ever was, in the part-filled page.
  EXPECT_EQ(cache.extend(0, 0, 256), static_cast<int>(keep.size()));
  view = cache.view(0);
  EXPECT_EQ(view.positions[keep.size()], 768);
  EXPECT_EQ(cache.pages_in_use(), 2);
}

TEST_F(KvCacheTest, PositionsGoOnAfterTheNewestTokensWereEvicted) {
  KvCache cache = make(layout({kBytes}));
  cache.extend(0, 0, 512);
  const std::vector<int32_t> keep = {3, 9};
  cache.evict(0, 0, keep);
  cache.evict(0, 0, {});
  cache.extend(0, 0, 256);
  EXPECT_EQ(cache.view(0).positions[0], 512);
}

TEST_F(KvCacheTest, PinnedTokensSurviveAnEviction) {
  KvCache cache = make(layout({kBytes}));
  std::vector<uint16_t> data(512 * kHeads * kDim);
  std::iota(data.begin(), data.end(), uint16_t{0});
  const int32_t first = 0, count = 512;
  const sikv_rows rows{data.data(), SIKV_FP16, 512, &first, &count, kHeads * kDim, kDim};
  cache.extend(0, 0, 512);
  const std::vector<int32_t> pinned = {3, 300}, keep = {100, 101};
  cache.pin(0, 0, pinned);
  cache.copy_pins(0, rows, rows);
  cache.evict(0, 0, keep);
  const sikv_cache_view view = cache.view(0);
  EXPECT_EQ(cache.encoded_len(0, 0), 4);
  EXPECT_EQ(view.pinned_slots[0], 0);
  EXPECT_EQ(view.pinned_slots[1], 3);
  EXPECT_EQ(view.positions[3], 300);
}

TEST_F(KvCacheTest, SharedScalesCannotBeTornApart) {
  KvCache cache = make(layout({kBytes, kShared}));
  cache.extend(0, 0, 256);
  const std::vector<int32_t> some = {0, 1, 2, 64};
  EXPECT_THROW(cache.evict(0, 0, some), Error);
  std::vector<int32_t> part(40);
  std::iota(part.begin(), part.end(), 0);
  EXPECT_THROW(cache.evict(0, 0, part), Error);
  std::vector<int32_t> groups(32);
  std::iota(groups.begin(), groups.end(), 96);
  EXPECT_NO_THROW(cache.evict(0, 0, groups));
  EXPECT_EQ(cache.encoded_len(0, 0), 32);
}

}  // namespace
}  // namespace sikv
