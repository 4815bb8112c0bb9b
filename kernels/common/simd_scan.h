// The index scan on one CPU core: a score for every encoded token from one bit per key channel.
//
// Input. Pages of 256 tokens; in a page the index plane is 32 tiles of 8 tokens, one after the
// other; a tile is D/4 little-endian 32-bit words, word g = the 8 nibbles of channel group g:
//
//   page   | tile 0 | tile 1 | ... | tile 31 |        256 * D/8 bytes
//   tile   | word 0 | word 1 | ... | word D/4-1 |     D bytes, 8 tokens
//   word   bits 0-3 token 0, bits 4-7 token 1, ... bits 28-31 token 7
//
// A page is always allocated whole, so the bytes behind the last token may be read; what they hold
// never reaches a result.
//
// score[t] = sum over groups g of table[g][nibble(t, g)]. With the tables quantised to 6 bits four
// groups fit a byte, and a 16-entry table is one byte shuffle.
//
// Include from a file that goes through hwy/foreach_target.h, or alone for the static target.

#ifndef SIKV_KERNELS_COMMON_SIMD_SCAN_H_
#define SIKV_KERNELS_COMMON_SIMD_SCAN_H_

#include <stddef.h>
#include <stdint.h>

#include "kernels/common/prefetch.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {

// Where the index planes of one (layer, sequence, KV head) are: page i at
// base + page_table[i] * page_stride.
struct IndexPages {
  const uint8_t* base;        // 64-byte aligned pages are fastest; any alignment works
  int64_t page_stride;        // bytes
  const int32_t* page_table;  // [ceil(tokens / 256)]
};

inline constexpr int64_t kScanPageTokens = SIKV_PAGE_TOKENS;
inline constexpr int kTileTokens = 8;
inline constexpr int kTableMax = 63;

// Histogram bins of integer scores: 0 .. 63 * D/4.
constexpr int ScoreBins(int head_dim) { return head_dim / 4 * kTableMax + 1; }

constexpr bool ScanSupports(int head_dim) {
  return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_SCAN_H_

#if defined(SIKV_KERNELS_COMMON_SIMD_SCAN_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_SCAN_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_SCAN_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_SCAN_TARGET_
#endif

#include <math.h>
#include <string.h>

#include "hwy/highway.h"
#include "kernels/common/simd_select.h"

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Pages ahead of the one being scored whose lines are requested: the hardware prefetcher stops at a
// 4 KiB boundary, which is every page at D = 128. Requests come line by line with the work: whole
// pages in bursts, or every second line only, cost 1.3 to 2.8 times (Zen 5). Two pages side by side
// gain 10% where pages are shuffled and lose 20% where they follow each other.
inline constexpr int64_t kPrefetchPages = 4;

#if HWY_TARGET == HWY_SCALAR

// Highway's last resort, where a target has no 16-byte vectors at all.
template <int kGroups>
class PageScorer {
 public:
  explicit PageScorer(const uint8_t* tables) : tables_(tables) {}

  void Score(const uint8_t* HWY_RESTRICT plane, const uint8_t*,
             int16_t* HWY_RESTRICT scores) const {
    for (int64_t t = 0; t < kScanPageTokens; ++t) {
      const uint8_t* byte = plane + t / kTileTokens * 4 * kGroups + t % kTileTokens / 2;
      int score = 0;
      for (int g = 0; g < kGroups; ++g) {
        score += tables_[16 * g + (byte[4 * g] >> (4 * (t % 2)) & 15)];
      }
      scores[t] = static_cast<int16_t>(score);
    }
  }

 private:
  const uint8_t* tables_;
};

#else

// Scores pages with 6-bit tables. Four tiles are loaded side by side; a 4 x 4 transpose of 32-bit
// words in each 128-bit block turns them into blocks of one group and 32 tokens, for which a byte
// shuffle in the block is the lookup. Sums of 4 groups fit a byte (4 * 63 = 252).
//
// 64 GB/s of codes from L2 with AVX-512 and 38 with AVX2 (Zen 5), against 25 to 45 from memory. A
// version with vpermb, whose 64 entries hold the tables of 4 groups, and multiply-adds for the sum
// over groups took 12% less time in L2 and none less from memory: not worth leaving Highway for.
template <int kGroups>
class PageScorer {
  static constexpr size_t kTileBytes = 4 * kGroups;
  static constexpr size_t kMaxBytes = HWY_HAVE_SCALABLE ? 16 : HWY_MAX_BYTES;
  // Widest vector that divides a tile: 96-byte tiles (D = 96) stop at 32.
  static constexpr size_t kBytes =
      kTileBytes % 64 == 0 && kMaxBytes >= 64 ? 64 : (kMaxBytes >= 32 ? 32 : 16);
  static constexpr size_t kChunks = kTileBytes / kBytes;
  static constexpr size_t kBlocks = kBytes / 16;

  using D8 = hn::FixedTag<uint8_t, kBytes>;
  using D16 = hn::FixedTag<uint16_t, kBytes / 2>;
  using D32 = hn::FixedTag<uint32_t, kBytes / 4>;
  using D64 = hn::FixedTag<uint64_t, kBytes / 8>;

 public:
  // `tables` [kGroups][16], entries 0..63.
  explicit PageScorer(const uint8_t* HWY_RESTRICT tables) {
    for (size_t c = 0; c < kChunks; ++c) {
      for (size_t j = 0; j < 4; ++j) {
        for (size_t b = 0; b < kBlocks; ++b) {
          memcpy(tables_ + (c * 4 + j) * kBytes + 16 * b, tables + 16 * (4 * (c * kBlocks + b) + j),
                 16);
        }
      }
    }
  }

  // `plane` [256 * D/8] -> `scores` [256], aligned; requests the lines of `next` meanwhile.
  HWY_INLINE void Score(const uint8_t* HWY_RESTRICT plane, const uint8_t* next,
                        int16_t* HWY_RESTRICT scores) const {
    const D8 d8;
    const D16 d16;
    const D32 d32;
    const D64 d64;
    for (size_t t = 0; t < kScanPageTokens / kTileTokens; t += 4) {
      const uint8_t* HWY_RESTRICT tiles = plane + t * kTileBytes;
      for (size_t line = 0; line < 4 * kTileBytes; line += 64) {
        PrefetchLine(next + t * kTileBytes + line);
      }
      // Byte b of a word holds tokens 2b (low nibble) and 2b + 1 (high). 16-bit sums of whole bytes
      // and of their upper halves: even bytes are the difference, which saves a mask per chunk.
      auto low_all = hn::Zero(d16), low_odd = hn::Zero(d16);
      auto high_all = hn::Zero(d16), high_odd = hn::Zero(d16);
      for (size_t c = 0; c < kChunks; ++c) {
        const uint8_t* HWY_RESTRICT from = tiles + c * kBytes;
        const auto a0 = hn::BitCast(d32, hn::LoadU(d8, from));
        const auto a1 = hn::BitCast(d32, hn::LoadU(d8, from + kTileBytes));
        const auto a2 = hn::BitCast(d32, hn::LoadU(d8, from + 2 * kTileBytes));
        const auto a3 = hn::BitCast(d32, hn::LoadU(d8, from + 3 * kTileBytes));
        const auto b0 = hn::BitCast(d64, hn::InterleaveLower(d32, a0, a1));
        const auto b1 = hn::BitCast(d64, hn::InterleaveLower(d32, a2, a3));
        const auto b2 = hn::BitCast(d64, hn::InterleaveUpper(d32, a0, a1));
        const auto b3 = hn::BitCast(d64, hn::InterleaveUpper(d32, a2, a3));
        const uint8_t* HWY_RESTRICT table = tables_ + c * 4 * kBytes;
        auto low = hn::Zero(d8);
        auto high = hn::Zero(d8);
        AddGroup(hn::BitCast(d8, hn::InterleaveLower(d64, b0, b1)), table, &low, &high);
        AddGroup(hn::BitCast(d8, hn::InterleaveUpper(d64, b0, b1)), table + kBytes, &low, &high);
        AddGroup(hn::BitCast(d8, hn::InterleaveLower(d64, b2, b3)), table + 2 * kBytes, &low,
                 &high);
        AddGroup(hn::BitCast(d8, hn::InterleaveUpper(d64, b2, b3)), table + 3 * kBytes, &low,
                 &high);
        low_all = hn::Add(low_all, hn::BitCast(d16, low));
        low_odd = hn::Add(low_odd, hn::ShiftRight<8>(hn::BitCast(d16, low)));
        high_all = hn::Add(high_all, hn::BitCast(d16, high));
        high_odd = hn::Add(high_odd, hn::ShiftRight<8>(hn::BitCast(d16, high)));
      }
      const auto low_even = hn::Sub(low_all, hn::ShiftLeft<8>(low_odd));
      const auto high_even = hn::Sub(high_all, hn::ShiftLeft<8>(high_odd));
      StoreTokens(SumBlocks(low_even), SumBlocks(high_even), SumBlocks(low_odd),
                  SumBlocks(high_odd), scores + t * kTileTokens);
    }
  }

 private:
  static HWY_INLINE void AddGroup(hn::Vec<D8> codes, const uint8_t* HWY_RESTRICT table,
                                  hn::Vec<D8>* low, hn::Vec<D8>* high) {
    const D8 d8;
    const D16 d16;
    const auto entries = hn::Load(d8, table);
    const auto nibble = hn::Set(d8, 15);
    const auto upper = hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, codes)));
    *low = hn::Add(*low, hn::TableLookupBytes(entries, hn::And(codes, nibble)));
    *high = hn::Add(*high, hn::TableLookupBytes(entries, hn::And(upper, nibble)));
  }

  using D16x8 = hn::FixedTag<uint16_t, 8>;
  static HWY_INLINE hn::Vec<D16x8> SumBlocks(hn::Vec<D16> v) {
#if HWY_MAX_BYTES >= 64 && !HWY_HAVE_SCALABLE
    if constexpr (kBytes == 64) {
      const hn::Half<D16> dh;
      const hn::Half<decltype(dh)> dq;
      const auto half = hn::Add(hn::LowerHalf(dh, v), hn::UpperHalf(dh, v));
      return hn::Add(hn::LowerHalf(dq, half), hn::UpperHalf(dq, half));
    }
#endif
#if HWY_MAX_BYTES >= 32 && !HWY_HAVE_SCALABLE
    if constexpr (kBytes == 32) {
      const hn::Half<D16> dh;
      return hn::Add(hn::LowerHalf(dh, v), hn::UpperHalf(dh, v));
    }
#endif
    if constexpr (kBytes == 16) return v;
  }

  // Lane i of each holds token 4i (+ 1 high, + 2 odd) of 32.
  static HWY_INLINE void StoreTokens(hn::Vec<D16x8> low_even, hn::Vec<D16x8> high_even,
                                     hn::Vec<D16x8> low_odd, hn::Vec<D16x8> high_odd,
                                     int16_t* HWY_RESTRICT out) {
    const D16x8 d16;
    const hn::FixedTag<uint32_t, 4> d32;
    const hn::FixedTag<int16_t, 8> di;
    const auto even0 = hn::BitCast(d32, hn::InterleaveLower(d16, low_even, high_even));
    const auto even1 = hn::BitCast(d32, hn::InterleaveUpper(d16, low_even, high_even));
    const auto odd0 = hn::BitCast(d32, hn::InterleaveLower(d16, low_odd, high_odd));
    const auto odd1 = hn::BitCast(d32, hn::InterleaveUpper(d16, low_odd, high_odd));
    hn::Store(hn::BitCast(di, hn::InterleaveLower(d32, even0, odd0)), di, out);
    hn::Store(hn::BitCast(di, hn::InterleaveUpper(d32, even0, odd0)), di, out + 8);
    hn::Store(hn::BitCast(di, hn::InterleaveLower(d32, even1, odd1)), di, out + 16);
    hn::Store(hn::BitCast(di, hn::InterleaveUpper(d32, even1, odd1)), di, out + 24);
  }

  alignas(64) uint8_t tables_[16 * kGroups];
};

#endif  // HWY_TARGET == HWY_SCALAR

inline const uint8_t* PageAt(const IndexPages& pages, int64_t page) {
  return pages.base + pages.page_table[page] * pages.page_stride;
}

template <int kGroups>
HWY_INLINE void ScanScoresGroups(const IndexPages& pages, int64_t tokens,
                                 const uint8_t* HWY_RESTRICT tables, uint16_t* HWY_RESTRICT scores,
                                 uint32_t* HWY_RESTRICT histogram) {
  constexpr int kBins = kGroups * kTableMax + 1;
  // Neighbouring tokens often share a bin, and an increment waits for the one before it in the same
  // word: four counters per bin in turn.
  uint32_t lanes[4][kBins];
  if (histogram != nullptr) memset(lanes, 0, sizeof(lanes));
  const PageScorer<kGroups> scorer(tables);
  const int64_t num_pages = (tokens + kScanPageTokens - 1) / kScanPageTokens;
  HWY_ALIGN int16_t block[kScanPageTokens];
  for (int64_t p = 0; p < num_pages; ++p) {
    scorer.Score(PageAt(pages, p), PageAt(pages, HWY_MIN(p + kPrefetchPages, num_pages - 1)),
                 block);
    const int64_t here = HWY_MIN(kScanPageTokens, tokens - p * kScanPageTokens);
    memcpy(scores + p * kScanPageTokens, block, static_cast<size_t>(here) * sizeof(uint16_t));
    if (histogram == nullptr) continue;
    int64_t i = 0;
    for (; i + 4 <= here; i += 4) {
      ++lanes[0][block[i]];
      ++lanes[1][block[i + 1]];
      ++lanes[2][block[i + 2]];
      ++lanes[3][block[i + 3]];
    }
    for (; i < here; ++i) ++lanes[0][block[i]];
  }
  if (histogram == nullptr) return;
  for (int b = 0; b < kBins; ++b) {
    histogram[b] = lanes[0][b] + lanes[1][b] + lanes[2][b] + lanes[3][b];
  }
}

// A score that more than `budget` tokens probably pass, from evenly spaced pages: without it every
// token is a candidate until `budget` have been seen, 5.6 times as many as are selected at k = 9830
// of 1M codes. -1 where a sample would cost more than that.
template <int kGroups>
int32_t SampledThreshold(const IndexPages& pages, int64_t tokens, const PageScorer<kGroups>& scorer,
                         int64_t budget) {
  constexpr int64_t kSampledPages = 32, kTimes = 8;
  const int64_t full_pages = tokens / kScanPageTokens;
  if (full_pages < kTimes * kSampledPages) return -1;
  uint32_t histogram[kGroups * kTableMax + 1] = {};
  HWY_ALIGN int16_t block[kScanPageTokens];
  for (int64_t i = 0; i < kSampledPages; ++i) {
    const uint8_t* page = PageAt(pages, (2 * i + 1) * full_pages / (2 * kSampledPages));
    scorer.Score(page, page, block);
    for (const int16_t score : block) ++histogram[score];
  }
  // Half as many again as expected, and four standard deviations.
  const double expected =
      static_cast<double>(budget) * kSampledPages * kScanPageTokens / static_cast<double>(tokens);
  const double wanted = 1.5 * expected + 4.0 * sqrt(expected) + 4.0;
  int32_t threshold = kGroups * kTableMax;
  double above = 0.0;
  while (threshold >= 0 && above < wanted) above += histogram[threshold--];
  return threshold;
}

template <int kGroups>
HWY_INLINE int64_t ScanSelectGroups(const IndexPages& pages, int64_t tokens,
                                    const uint8_t* HWY_RESTRICT tables, Excluded excluded,
                                    int64_t budget, void* scratch,
                                    int32_t* HWY_RESTRICT positions) {
  const PageScorer<kGroups> scorer(tables);
  constexpr int kBins = kGroups * kTableMax + 1;
  const int64_t num_pages = (tokens + kScanPageTokens - 1) / kScanPageTokens;
  HWY_ALIGN int16_t block[kScanPageTokens];
  for (int32_t start = SampledThreshold(pages, tokens, scorer, budget);; start = -1) {
    RunningSelect select(budget, kBins, scratch);
    select.StartAt(start);
    int64_t next = 0;
    for (int64_t p = 0; p < num_pages; ++p) {
      scorer.Score(PageAt(pages, p), PageAt(pages, HWY_MIN(p + kPrefetchPages, num_pages - 1)),
                   block);
      MaskBlock(p * kScanPageTokens, tokens, excluded, &next, block);
      select.Add(block, p * kScanPageTokens);
    }
    if (select.Holds()) return select.Finish(positions);
  }
}

// fp32 tables, exact: lanes are tokens and groups are added in ascending order, so every score
// equals the scalar sum bit for bit.
template <int kGroups>
HWY_INLINE void ScanExactGroups(const IndexPages& pages, int64_t tokens,
                                const float* HWY_RESTRICT tables, float* HWY_RESTRICT scores) {
  constexpr size_t kTileWords = kGroups;
  const DF32 df;
  const DU32 du;
  const DI32 di;
  const size_t n = hn::Lanes(df);
  // Tokens handled together: four vectors of sums hide the latency of the additions.
  const size_t step = 4 * n;
  const auto nibble = hn::Set(du, 15u);
  const auto shifts = hn::ShiftLeft<2>(hn::And(hn::Iota(du, 0u), hn::Set(du, 7u)));
  const auto first_tile = hn::Lt(hn::Iota(di, 0), hn::Set(di, kTileTokens));
  const int64_t num_pages = (tokens + kScanPageTokens - 1) / kScanPageTokens;
  HWY_ALIGN float block[kScanPageTokens];
  for (int64_t p = 0; p < num_pages; ++p) {
    const uint8_t* HWY_RESTRICT plane = PageAt(pages, p);
    const uint8_t* next = PageAt(pages, HWY_MIN(p + kPrefetchPages, num_pages - 1));
    const auto lookup = [&](size_t token, int g) HWY_ATTR {
      const float* HWY_RESTRICT table = tables + 16 * g;
      const uint8_t* word = plane + (token / kTileTokens * kTileWords + static_cast<size_t>(g)) * 4;
      uint32_t w0;
      memcpy(&w0, word, 4);
      // Two tiles when a vector has 16 lanes.
      auto words = hn::Set(du, w0);
      if (n == 16) {
        uint32_t w1;
        memcpy(&w1, word + 4 * kTileWords, 4);
        words = hn::IfThenElse(hn::RebindMask(du, first_tile), words, hn::Set(du, w1));
      } else if (n < 8) {
        words = hn::Set(du, w0 >> (4 * (token % kTileTokens)));
      }
      const auto index = hn::BitCast(di, hn::And(hn::Shr(words, shifts), nibble));
      if (n == 16) {
        return hn::TableLookupLanes(hn::LoadU(df, table), hn::IndicesFromVec(df, index));
      }
      if (n == 8) {
        const auto lane = hn::IndicesFromVec(df, hn::And(index, hn::Set(di, 7)));
        const auto low = hn::TableLookupLanes(hn::LoadU(df, table), lane);
        const auto high = hn::TableLookupLanes(hn::LoadU(df, table + 8), lane);
        return hn::IfThenElse(hn::RebindMask(df, hn::Gt(index, hn::Set(di, 7))), high, low);
      }
      return hn::GatherIndex(df, table, index);
    };
    for (size_t t = 0; t < kScanPageTokens; t += step) {
      for (size_t line = 0; line < step / kTileTokens * kTileWords * 4; line += 64) {
        PrefetchLine(next + t / kTileTokens * kTileWords * 4 + line);
      }
      auto sum0 = lookup(t, 0), sum1 = lookup(t + n, 0);
      auto sum2 = lookup(t + 2 * n, 0), sum3 = lookup(t + 3 * n, 0);
      for (int g = 1; g < kGroups; ++g) {
        sum0 = hn::Add(sum0, lookup(t, g));
        sum1 = hn::Add(sum1, lookup(t + n, g));
        sum2 = hn::Add(sum2, lookup(t + 2 * n, g));
        sum3 = hn::Add(sum3, lookup(t + 3 * n, g));
      }
      hn::Store(sum0, df, block + t);
      hn::Store(sum1, df, block + t + n);
      hn::Store(sum2, df, block + t + 2 * n);
      hn::Store(sum3, df, block + t + 3 * n);
    }
    const int64_t here = HWY_MIN(kScanPageTokens, tokens - p * kScanPageTokens);
    memcpy(scores + p * kScanPageTokens, block, static_cast<size_t>(here) * sizeof(float));
  }
}

// Scores of all tokens, and their histogram [ScoreBins(head_dim)] unless it is null. `tables`
// [D/4][16] with entries 0..63; `scores` [tokens]. head_dim must be one that ScanSupports.
inline HWY_NOINLINE void ScanScores(const IndexPages& pages, int64_t tokens, int head_dim,
                                    const uint8_t* tables, uint16_t* scores, uint32_t* histogram) {
  switch (head_dim) {
    case 64:
      return ScanScoresGroups<16>(pages, tokens, tables, scores, histogram);
    case 96:
      return ScanScoresGroups<24>(pages, tokens, tables, scores, histogram);
    case 128:
      return ScanScoresGroups<32>(pages, tokens, tables, scores, histogram);
    case 256:
      return ScanScoresGroups<64>(pages, tokens, tables, scores, histogram);
  }
}

// Scan and select in one pass over the codes, without a score array: the fast path. Same result as
// ScanScores and CountingSelect. `scratch` [RunningSelectBytes(budget)], 64-byte aligned;
// `positions` [budget]. Returns how many positions were written.
inline HWY_NOINLINE int64_t ScanSelect(const IndexPages& pages, int64_t tokens, int head_dim,
                                       const uint8_t* tables, Excluded excluded, int64_t budget,
                                       void* scratch, int32_t* positions) {
  if (budget <= 0) return 0;
  if (budget >= tokens - excluded.count) return SelectAll(tokens, excluded, positions);
  switch (head_dim) {
    case 64:
      return ScanSelectGroups<16>(pages, tokens, tables, excluded, budget, scratch, positions);
    case 96:
      return ScanSelectGroups<24>(pages, tokens, tables, excluded, budget, scratch, positions);
    case 128:
      return ScanSelectGroups<32>(pages, tokens, tables, excluded, budget, scratch, positions);
    case 256:
      return ScanSelectGroups<64>(pages, tokens, tables, excluded, budget, scratch, positions);
  }
  return 0;
}

// Exact scores of all tokens from fp32 `tables` [D/4][16]; `scores` [tokens]. Select with
// SelectFloat.
inline HWY_NOINLINE void ScanExact(const IndexPages& pages, int64_t tokens, int head_dim,
                                   const float* tables, float* scores) {
  switch (head_dim) {
    case 64:
      return ScanExactGroups<16>(pages, tokens, tables, scores);
    case 96:
      return ScanExactGroups<24>(pages, tokens, tables, scores);
    case 128:
      return ScanExactGroups<32>(pages, tokens, tables, scores);
    case 256:
      return ScanExactGroups<64>(pages, tokens, tables, scores);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // SIKV_KERNELS_COMMON_SIMD_SCAN_TARGET_
