// Top-k selection on one CPU core: which of n scored tokens are the `budget` best.
//
// Result, everywhere in this file: int32 positions, ascending, each once; ties at the cut go to the
// lower position; positions in `excluded` (pinned tokens: sorted, unique, within [0, tokens)) never
// appear and never count. A budget of all unexcluded tokens or more returns all of them.
//
// Integer scores are selected by counting: with D/4 groups of 0..63 a score is at most 4032, so a
// histogram gives the exact threshold and no comparison sort is needed. float scores go through a
// radix histogram over their order-preserving uint32 image.
//
// Both use one fact to touch few tokens: positions arrive in ascending order and ties go to the
// lower one, so once `budget` tokens score at least t, a later token needs more than t to be
// selected. In random order k (1 + ln(n/k)) tokens pass that test, 10.5K of 128K at k = 2048; in
// the worst order (ascending scores) all do, and the result is the same.
//
// Include from a file that goes through hwy/foreach_target.h, or alone for the static target.

#ifndef SIKV_KERNELS_COMMON_SIMD_SELECT_H_
#define SIKV_KERNELS_COMMON_SIMD_SELECT_H_

#include <stddef.h>
#include <stdint.h>

namespace sikv {

// Positions that must not be selected: sorted, unique, [count].
struct Excluded {
  const int32_t* positions = nullptr;
  int64_t count = 0;
};

// 64 groups of 0..63 (D = 256), and the zero.
inline constexpr int kMaxScoreBins = 64 * 63 + 1;

// Tokens per page; selection works through a page at a time so that its scores stay in L1.
inline constexpr int64_t kSelectBlock = 256;

// What candidate lists may be overrun by, in entries: one block, which is appended unconditionally,
// and one vector of the widest target.
inline constexpr int64_t kSelectSlack = kSelectBlock + 64;

// Candidates kept before a list is cut back to `budget`. In random order k (1 + ln(n/k)) arrive, so
// four budgets are cut back once at 128K and twice at 1M (k = 2048), each a pass over data in L2.
constexpr int64_t CandidateCapacity(int64_t budget) { return 4 * budget + 2 * kSelectBlock; }

constexpr size_t AlignUp64(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes of scratch, 64-byte aligned, for RunningSelect with this budget.
constexpr size_t RunningSelectBytes(int64_t budget) {
  const size_t entries = static_cast<size_t>(CandidateCapacity(budget) + kSelectSlack);
  return AlignUp64(entries * sizeof(int32_t)) + AlignUp64(entries * sizeof(int16_t)) +
         AlignUp64(kMaxScoreBins * sizeof(uint32_t));
}

// Bins of one pass of the radix select; their counters fill 8 KiB of L1.
inline constexpr uint32_t kRadixBins = 2048;

// Bytes of scratch, 64-byte aligned, for SelectFloat with this budget.
constexpr size_t SelectFloatBytes(int64_t budget) {
  const size_t entries = static_cast<size_t>(CandidateCapacity(budget) + kSelectSlack);
  return 2 * AlignUp64(entries * sizeof(int32_t)) + AlignUp64((kRadixBins + 1) * sizeof(uint32_t));
}

// All of [0, tokens) but the excluded: what every selection is when the budget covers them.
inline int64_t SelectAll(int64_t tokens, Excluded excluded, int32_t* positions) {
  int64_t count = 0;
  int64_t e = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    if (e < excluded.count && excluded.positions[e] == t) {
      ++e;
    } else {
      positions[count++] = static_cast<int32_t>(t);
    }
  }
  return count;
}

// nibbles[mask]: which lanes are set, lowest first, one per nibble.
struct CompressLanes {
  constexpr CompressLanes() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      int out = 0;
      for (uint32_t lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) nibbles[mask] |= lane << (4 * out++);
      }
    }
  }
  uint32_t nibbles[256] = {};
};
inline constexpr CompressLanes kCompressLanes;

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_SELECT_H_

#if defined(SIKV_KERNELS_COMMON_SIMD_SELECT_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_SELECT_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_SELECT_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_SELECT_TARGET_
#endif

#include <string.h>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// 512 bits at most, so that block loops and the slack above hold for every target.
using DI32 = hn::CappedTag<int32_t, 16>;
using DU32 = hn::CappedTag<uint32_t, 16>;
using DF32 = hn::CappedTag<float, 16>;
using DI16 = hn::CappedTag<int16_t, 32>;
using DI16Half = hn::Rebind<int16_t, DI32>;
// Of a vector of DI16, on any machine with this target.
inline constexpr size_t kLeastLanes = HWY_TARGET == HWY_SCALAR ? 1 : 8;

#if HWY_TARGET != HWY_SCALAR && !HWY_HAVE_SCALABLE && HWY_MAX_BYTES <= 32
#define SIKV_OWN_COMPRESS 1
#else
#define SIKV_OWN_COMPRESS 0
#endif

// Moves the lanes under a mask to the front of a vector; behind them is garbage.
//
// Stored with StoreU, not CompressStore, whose memory form is microcoded on Zen 4 and 5. Without a
// native instruction the permutation comes from kCompressLanes: the function-local tables of
// Highway 1.0.3 are copied to the stack at every call by GCC 12 (27 ns a vector; selecting 2048 of
// 128K tokens on AVX2 then took 160 us instead of 95).
class Compressor {
 public:
  HWY_INLINE explicit Compressor(hn::Mask<DI32> mask) {
#if SIKV_OWN_COMPRESS
    const DU32 d;
    uint8_t bits[8];
    hn::StoreMaskBits(DI32(), mask, bits);
    count_ = hwy::PopCount(bits[0]);
    const auto shifts = hn::ShiftLeft<2>(hn::Iota(d, 0u));
    const auto last = hn::Set(d, static_cast<uint32_t>(hn::Lanes(d) - 1));
    const auto lanes = hn::And(hn::Shr(hn::Set(d, kCompressLanes.nibbles[bits[0]]), shifts), last);
    indices_ = hn::BitCast(DI32(), lanes);
#else
    mask_ = mask;
    count_ = hn::CountTrue(DI32(), mask);
#endif
  }
  HWY_INLINE hn::Vec<DI32> operator()(hn::Vec<DI32> v) const {
#if SIKV_OWN_COMPRESS
    return hn::TableLookupLanes(v, hn::IndicesFromVec(DI32(), indices_));
#else
    return hn::Compress(v, mask_);
#endif
  }
  HWY_INLINE int64_t count() const { return static_cast<int64_t>(count_); }

 private:
#if SIKV_OWN_COMPRESS
  hn::Vec<DI32> indices_;
#else
  hn::Mask<DI32> mask_;
#endif
  size_t count_;
};

// Decides which of a stream of keys, seen in ascending position, are kept: all above a threshold
// and the first `ties` equal to it.
class Cut {
 public:
  Cut(int32_t threshold, int64_t ties) : threshold_(threshold), ties_(ties) {}

  HWY_INLINE hn::Mask<DI32> Keep(hn::Vec<DI32> keys) {
    const DI32 d;
    const auto threshold = hn::Set(d, threshold_);
    const auto above = hn::Gt(keys, threshold);
    if (ties_ == 0) return above;
    const auto equal = hn::Eq(keys, threshold);
    const auto count = static_cast<int64_t>(hn::CountTrue(d, equal));
    if (count <= ties_) {
      ties_ -= count;
      return hn::Or(above, equal);
    }
    return KeepSomeTies(keys);
  }

 private:
  // Happens in one vector of the whole stream.
  HWY_NOINLINE hn::Mask<DI32> KeepSomeTies(hn::Vec<DI32> keys) {
    const DI32 d;
    HWY_ALIGN int32_t lanes[16];
    hn::Store(keys, d, lanes);
    for (size_t i = 0; i < hn::Lanes(d); ++i) {
      const bool tie = lanes[i] == threshold_ && ties_ > 0;
      ties_ -= tie;
      lanes[i] = lanes[i] > threshold_ || tie;
    }
    return hn::Gt(hn::Load(d, lanes), hn::Zero(d));
  }

  int32_t threshold_;
  int64_t ties_;
};

// The `budget` best of integer scores that arrive block by block, in order. Keeps a list of
// candidates and a histogram of those above a threshold that only rises.
class RunningSelect {
 public:
  // `bins` = highest score + 1. `scratch` [RunningSelectBytes(budget)], 64-byte aligned.
  RunningSelect(int64_t budget, int bins, void* scratch)
      : budget_(budget), capacity_(CandidateCapacity(budget)) {
    const size_t entries = static_cast<size_t>(capacity_ + kSelectSlack);
    auto* bytes = static_cast<uint8_t*>(scratch);
    positions_ = reinterpret_cast<int32_t*>(bytes);
    bytes += AlignUp64(entries * sizeof(int32_t));
    scores_ = reinterpret_cast<int16_t*>(bytes);
    bytes += AlignUp64(entries * sizeof(int16_t));
    histogram_ = reinterpret_cast<uint32_t*>(bytes);
    memset(histogram_, 0, static_cast<size_t>(bins) * sizeof(uint32_t));
  }

  // Before the first block: passes over scores up to `threshold`. Whether that was right Holds()
  // says after the last one; if not, start again without.
  void StartAt(int32_t threshold) { threshold_ = start_ = threshold; }
  bool Holds() const { return start_ < 0 || threshold_ > start_; }

  // Scores of positions first .. first + 255; -1 marks those that are excluded or past the end.
  HWY_INLINE void Add(const int16_t* HWY_RESTRICT block, int64_t first) {
    const DI16 d;
    const size_t n = hn::Lanes(d);
    const auto threshold = hn::Set(d, static_cast<int16_t>(threshold_));
    // All comparisons before the first branch on one.
    uint64_t masks[kSelectBlock / kLeastLanes];
    for (size_t v = 0; v < kSelectBlock / n; ++v) {
      const auto pass = hn::Gt(hn::Load(d, block + v * n), threshold);
#if HWY_TARGET == HWY_SCALAR
      masks[v] = hn::CountTrue(d, pass);
#else
      masks[v] = 0;  // of which StoreMaskBits may write less
      hn::StoreMaskBits(d, pass, reinterpret_cast<uint8_t*>(masks + v));
#endif
    }
    // Bit by bit: compressing whole vectors instead, always or only in blocks with many hits, took
    // 91 to 146 us for k = 9830 of 128K codes in cache where this takes 77 (Zen 5, AVX-512). Masks
    // of 64 tokens instead of a vector's: 2 to 7 % slower over the whole scan (Sapphire Rapids).
    const uint64_t lanes = n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
    const int64_t before = count_;
    for (size_t v = 0; v < kSelectBlock / n; ++v) {
      for (uint64_t mask = masks[v] & lanes; mask != 0; mask &= mask - 1) {
        const size_t i = v * n + hwy::Num0BitsBelowLS1Bit_Nonzero64(mask);
        const int16_t score = block[i];
        scores_[count_] = score;
        positions_[count_] = static_cast<int32_t>(first + static_cast<int64_t>(i));
        ++count_;
        ++histogram_[score];
      }
    }
    above_ += count_ - before;
    while (above_ >= budget_) above_ -= histogram_[++threshold_];
    if (count_ > capacity_) CutBack();
  }

  // Writes the selected positions [budget] and returns how many there are: `budget` of them if at
  // least so many unexcluded tokens were added.
  int64_t Finish(int32_t* HWY_RESTRICT positions) {
    CutBack();
    memcpy(positions, positions_, static_cast<size_t>(count_) * sizeof(int32_t));
    return count_;
  }

 private:
  // Leaves the best `budget` candidates in the list, in place: writes never pass reads.
  HWY_NOINLINE void CutBack() {
    const DI32 d;
    const DI16Half d16;
    const int64_t n = static_cast<int64_t>(hn::Lanes(d));
    if (threshold_ < 0) return;
    for (int64_t i = 0; i < n; ++i) scores_[count_ + i] = -1;
    Cut cut(threshold_, budget_ - above_);
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; i += n) {
      const auto scores = hn::PromoteTo(d, hn::LoadU(d16, scores_ + i));
      const auto positions = hn::LoadU(d, positions_ + i);
      const Compressor keep(cut.Keep(scores));
      hn::StoreU(hn::DemoteTo(d16, keep(scores)), d16, scores_ + kept);
      hn::StoreU(keep(positions), d, positions_ + kept);
      kept += keep.count();
    }
    count_ = kept;
  }

  int64_t budget_;
  int64_t capacity_;
  int64_t count_ = 0;
  int64_t above_ = 0;  // tokens seen with a score above threshold_, less than budget_
  // budget_ tokens seen score at least this; before there are as many, start_.
  int32_t threshold_ = -1, start_ = -1;
  int32_t* positions_;
  int16_t* scores_;
  uint32_t* histogram_;
};

// Copies a block of scores with the excluded and those past the end marked -1. `next` walks the
// excluded list across calls.
HWY_INLINE void MaskBlock(int64_t first, int64_t tokens, Excluded excluded, int64_t* next,
                          int16_t* block) {
  for (; *next < excluded.count && excluded.positions[*next] < first + kSelectBlock; ++*next) {
    block[excluded.positions[*next] - first] = -1;
  }
  for (int64_t i = tokens - first; i < kSelectBlock; ++i) block[i] = -1;
}

// Selects from scores and their histogram, both complete (ScanScores). The excluded are taken out
// of the histogram. `positions` [budget].
inline HWY_NOINLINE int64_t CountingSelect(const uint16_t* HWY_RESTRICT scores, int64_t tokens,
                                           uint32_t* HWY_RESTRICT histogram, int bins,
                                           Excluded excluded, int64_t budget,
                                           int32_t* HWY_RESTRICT positions) {
  if (budget <= 0) return 0;
  if (budget >= tokens - excluded.count) return SelectAll(tokens, excluded, positions);
  for (int64_t e = 0; e < excluded.count; ++e) --histogram[scores[excluded.positions[e]]];
  int64_t above = 0;
  int threshold = bins - 1;
  while (above + histogram[threshold] < budget) above += histogram[threshold--];

  const DI32 d;
  const DI16Half d16;
  const int64_t n = static_cast<int64_t>(hn::Lanes(d));
  Cut cut(threshold, budget - above);
  HWY_ALIGN int16_t masked[kSelectBlock];
  int64_t next = 0;
  int64_t count = 0;
  for (int64_t first = 0; first < tokens && count < budget; first += kSelectBlock) {
    const auto* block = reinterpret_cast<const int16_t*>(scores + first);
    const bool dirty = next < excluded.count && excluded.positions[next] < first + kSelectBlock;
    if (dirty || first + kSelectBlock > tokens) {
      memcpy(masked, block, static_cast<size_t>(HWY_MIN(kSelectBlock, tokens - first)) * 2);
      MaskBlock(first, tokens, excluded, &next, masked);
      block = masked;
    }
    for (int64_t i = 0; i < kSelectBlock; i += n) {
      const Compressor keep(cut.Keep(hn::PromoteTo(d, hn::LoadU(d16, block + i))));
      const auto kept = keep(hn::Iota(d, static_cast<int32_t>(first + i)));
      if (count + n <= budget) {
        hn::StoreU(kept, d, positions + count);
      } else {
        HWY_ALIGN int32_t last[16];
        hn::Store(kept, d, last);
        memcpy(positions + count, last, static_cast<size_t>(keep.count()) * sizeof(int32_t));
      }
      count += keep.count();
    }
  }
  return count;
}

// Order-preserving image: a < b as float iff Image(a) < Image(b) as int32. Both zeros give 0, and
// no float gives the lowest int32, which marks excluded tokens.
HWY_INLINE hn::Vec<DI32> FloatImage(hn::Vec<DF32> v) {
  const DI32 d;
  const auto bits = hn::BitCast(d, v);
  const auto magnitude = hn::And(bits, hn::Set(d, 0x7FFFFFFF));
  return hn::IfThenElse(hn::Lt(bits, hn::Zero(d)), hn::Neg(magnitude), bits);
}

inline constexpr int32_t kExcludedImage = INT32_MIN;

// Shortens the lists `keys` and `positions` [count], in place, to the `budget` best, or, unless
// `exact`, to at most half a budget more: then one histogram of the range of keys present is
// usually enough (2048 bins, so a thousandth of the list is in the last one), where the exact
// threshold takes two or three. count >= budget >= 1. Sets `threshold` to the lowest key that may
// remain and returns the new count. `histogram` [kRadixBins + 1].
inline HWY_NOINLINE int64_t CutBackKeys(int64_t budget, bool exact, int64_t count,
                                        int32_t* HWY_RESTRICT keys, int32_t* HWY_RESTRICT positions,
                                        uint32_t* HWY_RESTRICT histogram, int32_t* threshold) {
  const DI32 d;
  const int64_t n = static_cast<int64_t>(hn::Lanes(d));
  // The vector behind the list takes part in the passes below: repeat a key for the extremes.
  for (int64_t i = 0; i < n; ++i) keys[count + i] = keys[0];
  auto lows = hn::Set(d, keys[0]);
  auto highs = lows;
  for (int64_t i = 0; i < count; i += n) {
    const auto key = hn::LoadU(d, keys + i);
    lows = hn::Min(lows, key);
    highs = hn::Max(highs, key);
  }
  auto low = static_cast<uint32_t>(hn::GetLane(hn::MinOfLanes(d, lows)));
  uint32_t range = static_cast<uint32_t>(hn::GetLane(hn::MaxOfLanes(d, highs))) - low;
  int64_t need = budget;  // kept among the keys in [low, low + range]
  int64_t ties = 0;       // kept among the keys equal to the threshold; others in its bin all
  for (;;) {
    int shift = 0;
    while (range >> shift >= kRadixBins) ++shift;
    memset(histogram, 0, (kRadixBins + 1) * sizeof(uint32_t));
    for (int64_t i = 0; i < count; ++i) {
      // Keys outside the range land in the spare bin or above the bins that are looked at.
      const uint32_t bin = (static_cast<uint32_t>(keys[i]) - low) >> shift;
      ++histogram[HWY_MIN(bin, kRadixBins)];
    }
    uint32_t bin = range >> shift;
    while (histogram[bin] < need) need -= histogram[bin--];
    low += bin << shift;
    const int64_t extra = static_cast<int64_t>(histogram[bin]) - need;
    if (extra == 0 || (!exact && extra <= budget / 2)) {
      ties = count;
      break;
    }
    if (shift == 0) {
      ties = need;
      break;
    }
    range = (1u << shift) - 1;
  }
  *threshold = static_cast<int32_t>(low);

  for (int64_t i = 0; i < n; ++i) keys[count + i] = kExcludedImage;
  // All keys of the last bin, or the first few of one key.
  const bool whole_bin = ties == count;
  Cut cut(whole_bin && *threshold > kExcludedImage ? *threshold - 1 : *threshold,
          whole_bin ? 0 : ties);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += n) {
    const auto key = hn::LoadU(d, keys + i);
    const auto position = hn::LoadU(d, positions + i);
    const Compressor keep(cut.Keep(key));
    hn::StoreU(keep(key), d, keys + kept);
    hn::StoreU(keep(position), d, positions + kept);
    kept += keep.count();
  }
  return kept;
}

// The `budget` highest of float scores [tokens] without NaN; -inf is a score like any other.
// `scratch` [SelectFloatBytes(budget)], 64-byte aligned; `positions` [budget].
inline HWY_NOINLINE int64_t SelectFloat(const float* HWY_RESTRICT scores, int64_t tokens,
                                        Excluded excluded, int64_t budget, void* scratch,
                                        int32_t* HWY_RESTRICT positions) {
  if (budget <= 0) return 0;
  if (budget >= tokens - excluded.count) return SelectAll(tokens, excluded, positions);
  const int64_t capacity = CandidateCapacity(budget);
  const size_t entries = static_cast<size_t>(capacity + kSelectSlack);
  auto* bytes = static_cast<uint8_t*>(scratch);
  auto* keys = reinterpret_cast<int32_t*>(bytes);
  bytes += AlignUp64(entries * sizeof(int32_t));
  auto* kept = reinterpret_cast<int32_t*>(bytes);
  bytes += AlignUp64(entries * sizeof(int32_t));
  auto* histogram = reinterpret_cast<uint32_t*>(bytes);

  const DF32 df;
  const DI32 d;
  const int64_t n = static_cast<int64_t>(hn::Lanes(d));
  int32_t threshold = kExcludedImage;
  int64_t count = 0;
  int64_t next = 0;
  // Early the first time, so that the threshold starts to rise.
  int64_t limit = budget;
  HWY_ALIGN int32_t masked[kSelectBlock];
  for (int64_t first = 0; first < tokens; first += kSelectBlock) {
    const bool dirty = next < excluded.count && excluded.positions[next] < first + kSelectBlock;
    const auto above = hn::Set(d, threshold);
    if (dirty || first + kSelectBlock > tokens) {
      const int64_t here = HWY_MIN(kSelectBlock, tokens - first);
      for (int64_t i = 0; i < kSelectBlock; ++i) masked[i] = kExcludedImage;
      HWY_ALIGN float lanes[HWY_MAX_BYTES / sizeof(float)] = {};
      for (int64_t i = 0; i < here; i += n) {
        memcpy(lanes, scores + first + i, static_cast<size_t>(HWY_MIN(n, here - i)) * 4);
        hn::Store(FloatImage(hn::Load(df, lanes)), d, masked + i);
      }
      for (int64_t i = here; i < kSelectBlock; ++i) masked[i] = kExcludedImage;
      for (; next < excluded.count && excluded.positions[next] < first + kSelectBlock; ++next) {
        masked[excluded.positions[next] - first] = kExcludedImage;
      }
      for (int64_t i = 0; i < kSelectBlock; i += n) {
        const auto key = hn::Load(d, masked + i);
        const auto pass = hn::Gt(key, above);
        const Compressor keep(pass);
        hn::StoreU(keep(key), d, keys + count);
        hn::StoreU(keep(hn::Iota(d, static_cast<int32_t>(first + i))), d, kept + count);
        count += keep.count();
      }
    } else {
      for (int64_t i = 0; i < kSelectBlock; i += n) {
        const auto key = FloatImage(hn::LoadU(df, scores + first + i));
        const auto pass = hn::Gt(key, above);
        if (hn::AllFalse(d, pass)) continue;
        const Compressor keep(pass);
        hn::StoreU(keep(key), d, keys + count);
        hn::StoreU(keep(hn::Iota(d, static_cast<int32_t>(first + i))), d, kept + count);
        count += keep.count();
      }
    }
    if (count >= limit) {
      count = CutBackKeys(budget, false, count, keys, kept, histogram, &threshold);
      limit = 3 * budget;
    }
  }
  CutBackKeys(budget, true, count, keys, kept, histogram, &threshold);
  memcpy(positions, kept, static_cast<size_t>(budget) * sizeof(int32_t));
  return budget;
}

#undef SIKV_OWN_COMPRESS

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // SIKV_KERNELS_COMMON_SIMD_SELECT_TARGET_
