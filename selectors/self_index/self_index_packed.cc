// vpshufbitqmb, which picks a token's signs, comes with AVX3_DL.
#define HWY_WANT_AVX3_DL

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "selectors/self_index/self_index_packed.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "kernels/common/level_tables.h"
#include "kernels/common/simd_attention.h"
#include "selectors/self_index/self_index_packed.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::self_index {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

void Pack(const RowSource&, std::span<const int32_t>, int, PackedKeys&) {}
void PackedLogits(const PackedKeys&, int, const float*, const float*, float*, int64_t) {}

#else

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = sikv::HWY_NAMESPACE;

constexpr size_t kNibbles = 8;  // of a word

// Candidates between the one that is scored and the one whose line is requested: the hardware
// prefetcher stops at every 4 KiB, which are 64 candidates at D = 128.
constexpr int64_t kAhead = 32;

// Vectors of words that hold a candidate's codes.
constexpr size_t WordVectors(size_t head_dim) {
  return (head_dim / simd::kLanes + kNibbles - 1) / kNibbles;
}

template <RowFormat kFormat>
void PackRows(const RowSource& keys, std::span<const int32_t> slots, size_t head_dim,
              PackedKeys& packed) {
  constexpr int kLevelBits = CodeBits(kFormat);
  const simd::DU du;
  const auto ones = hn::Set(du, 1), levels = hn::Set(du, (1u << kLevelBits) - 1u);
  const size_t vectors = head_dim / simd::kLanes;
  const simd::RowStream rows(keys, head_dim, 1, nullptr);
  simd::SlotCursor cursor({slots.data(), 0, static_cast<int32_t>(slots.size())});
  int32_t found[kBlockRows];
  RowBlock blocks[2];
  const auto locate = [&](RowBlock& block) { rows.locate(found, cursor.next(found), block); };
  uint32_t* HWY_RESTRICT words = packed.words.data();
  float* HWY_RESTRICT scales = packed.scales.data();
  locate(blocks[0]);
  rows.request(blocks[0]);
  for (int which = 0; blocks[which].count > 0; which = 1 - which) {
    RowBlock& block = blocks[which];
    RowBlock& next = blocks[1 - which];
    locate(next);
    simd::OpenRows<kFormat>(keys, head_dim, block);
    scales = std::copy_n(block.scale, block.count, scales);
    for (int t = 0; t < block.count; ++t) {
      if (t < next.count) simd::PrefetchRow(keys, next, t);
      for (size_t w = 0; w < WordVectors(head_dim); ++w, words += simd::kLanes) {
        auto word = hn::Zero(du);
        for (size_t j = 0; j < std::min(kNibbles, vectors - w * kNibbles); ++j) {
          const size_t channel = (w * kNibbles + j) * simd::kLanes;
          const auto level = hn::And(simd::UnpackCodes<kLevelBits>(block.code[t], channel), levels);
          const auto signs = hn::Set(du, ~block.signs[t][channel / kUnit] >> channel % kUnit);
          const auto sign = hn::And(hn::Shr(signs, hn::Iota(du, 0)), ones);
          const auto code = hn::Or(hn::ShiftLeft<kLevelBits>(sign), level);
          word = hn::Or(word, hn::ShiftLeftSame(code, static_cast<int>(4 * j)));
        }
        hn::StoreU(word, du, words);
      }
    }
  }
}

void Pack(const RowSource& keys, std::span<const int32_t> slots, int head_dim, PackedKeys& packed) {
  const auto dim = static_cast<size_t>(head_dim);
  packed.bits = CodeBits(keys.format) + 1;
  packed.head_dim = head_dim;
  packed.count = std::ssize(slots);
  packed.words.resize(slots.size() * WordVectors(dim) * simd::kLanes);
  packed.scales.resize(slots.size());
  switch (keys.format) {
    case RowFormat::kSigned1:
      return PackRows<RowFormat::kSigned1>(keys, slots, dim, packed);
    case RowFormat::kSigned2:
      return PackRows<RowFormat::kSigned2>(keys, slots, dim, packed);
    default:
      return PackRows<RowFormat::kSigned3>(keys, slots, dim, packed);
  }
}

// dots [kRows, kHeads] of candidates that follow each other, row_words apart. Codes have kBits.
template <int kHeads, int kRows, int kBits>
HWY_INLINE void Dots(const uint32_t* HWY_RESTRICT words, size_t row_words, size_t head_dim,
                     const float* HWY_RESTRICT table, const float* HWY_RESTRICT q,
                     float* HWY_RESTRICT dots) {
  const simd::DF d;
  const simd::DU du;
  const size_t vectors = head_dim / simd::kLanes;
  simd::VF sums[kRows * kHeads];
  for (auto& sum : sums) sum = hn::Zero(d);
  for (size_t w = 0; w * kNibbles < vectors; ++w) {
    simd::VU codes[kRows];
    for (int i = 0; i < kRows; ++i) {
      codes[i] = hn::LoadU(du, words + static_cast<size_t>(i) * row_words + w * simd::kLanes);
    }
    const size_t end = std::min(kNibbles, vectors - w * kNibbles);
    for (size_t j = 0; j < end; ++j) {
      simd::VF query[kHeads];
      for (int h = 0; h < kHeads; ++h) {
        query[h] =
            hn::Load(d, q + static_cast<size_t>(h) * head_dim + (w * kNibbles + j) * simd::kLanes);
      }
      for (int i = 0; i < kRows; ++i) {
        const auto row = simd::Lookup<kBits>(table, codes[i]);
        codes[i] = hn::ShiftRight<4>(codes[i]);
        for (int h = 0; h < kHeads; ++h) {
          sums[i * kHeads + h] = hn::MulAdd(query[h], row, sums[i * kHeads + h]);
        }
      }
    }
  }
  for (int i = 0; i < kRows * kHeads; i += 4) {
    hn::Store(simd::ReduceLanes(simd::Sum(), sums[i], sums[i + 1], sums[i + 2], sums[i + 3]),
              simd::DF4(), dots + i);
  }
}

template <int kHeads, int kBits>
void LogitsOfHeads(const PackedKeys& packed, const float* table, const float* q, const float* shift,
                   int heads, float* HWY_RESTRICT logits, int64_t stride) {
  // Accumulators: 16 of 32 registers with AVX-512, 8 of 16 otherwise.
  constexpr int kSums = simd::kLanes == 16 ? 16 : 8, kRows = kSums / kHeads;
  const auto dim = static_cast<size_t>(packed.head_dim);
  const size_t row_words = WordVectors(dim) * simd::kLanes;
  const float* HWY_RESTRICT scales = packed.scales.data();
  alignas(64) float dots[kSums];
  const auto put = [&](int64_t t, int count) {
    for (int i = 0; i < count; ++i) {
      for (int h = 0; h < heads; ++h) {
        logits[h * stride + t + i] = dots[i * kHeads + h] * scales[t + i] + shift[h];
      }
    }
  };
  int64_t t = 0;
  for (; t + kRows <= packed.count; t += kRows) {
    for (int i = 0; i < kRows; ++i) {
      hwy::Prefetch(packed.words.data() + static_cast<size_t>(t + i + kAhead) * row_words);
    }
    Dots<kHeads, kRows, kBits>(packed.words.data() + static_cast<size_t>(t) * row_words, row_words,
                               dim, table, q, dots);
    put(t, kRows);
  }
  for (; t < packed.count; ++t) {  // four sums at least: the same candidate as often as it takes
    Dots<kHeads, 4 / kHeads, kBits>(packed.words.data() + static_cast<size_t>(t) * row_words, 0,
                                    dim, table, q, dots);
    put(t, 1);
  }
}

void PackedLogits(const PackedKeys& packed, int group, const float* q, const float* shift,
                  float* logits, int64_t stride) {
  if (packed.count == 0) return;
  const float* table = level_tables::kSignedLevels[packed.bits - 2].data();
  // Eight entries are one permute with AVX2, 16 are two and a blend; 2-bit codes use eight as well.
  constexpr decltype(&LogitsOfHeads<1, 3>) kByHeads[2][3] = {
      {LogitsOfHeads<1, 3>, LogitsOfHeads<2, 3>, LogitsOfHeads<kQuad, 3>},
      {LogitsOfHeads<1, 4>, LogitsOfHeads<2, 4>, LogitsOfHeads<kQuad, 4>}};
  const auto& by_heads = kByHeads[packed.bits == 4 ? 1 : 0];
  const int heads = PaddedHeads(group);
  const int pass = std::min(heads, kQuad), ways = pass == kQuad ? 2 : pass - 1;
  for (int h = 0; h < heads; h += pass) {
    by_heads[ways](packed, table, q + int64_t{h} * packed.head_dim, shift + h,
                   std::min(pass, group - h), logits + h * stride, stride);
  }
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace sikv::self_index
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv::self_index {

HWY_EXPORT(Pack);
HWY_EXPORT(PackedLogits);

void simd_pack(const RowSource& keys, std::span<const int32_t> slots, int head_dim,
               PackedKeys& packed) {
  HWY_DYNAMIC_DISPATCH(Pack)(keys, slots, head_dim, packed);
}
void simd_packed_logits(const PackedKeys& packed, int group, const float* q, const float* shift,
                        float* logits, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(PackedLogits)(packed, group, q, shift, logits, stride);
}

}  // namespace sikv::self_index
#endif  // HWY_ONCE
