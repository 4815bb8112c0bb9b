// One query group's attention over rows that are decoded on the fly, on one core.
//
// Rows go by in blocks of 32: logits of all heads (each key decoded once for up to 4 heads), block
// maximum and exponentials, then the weighted sum of the values (decoded once as well). While one
// block is worked on, the lines of the next are requested: selected rows lie anywhere in planes of
// gigabytes, so almost every one is a miss.
//
// Include from a file that goes through hwy/foreach_target.h.

#ifndef SIKV_KERNELS_COMMON_SIMD_ATTENTION_H_
#define SIKV_KERNELS_COMMON_SIMD_ATTENTION_H_

#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <limits>
#include <span>

#include "kernels/common/flash_state.h"
#include "kernels/common/simd_rows.h"

namespace sikv {

// The slots a task attends to: a list, or first .. first + count - 1 without those in `skip`.
struct SlotRange {
  const int32_t* listed = nullptr;
  int32_t first = 0;
  int32_t count = 0;
  std::span<const int32_t> skip = {};  // ascending; for ranges
};

// Heads that share a decoded row in one pass: 8 logits' sums, or 4 x 4 vectors of values, are as
// many accumulators as AVX-512 has registers for besides tables and codes.
inline constexpr int kQuad = 4;

// Query heads in memory: up to 2 as they are, more in whole quads, the last ones zero.
constexpr int PaddedHeads(int group) {
  return group <= 2 ? group : (group + kQuad - 1) / kQuad * kQuad;
}

// What one worker needs: 64-byte aligned.
struct AttendScratch {
  RowBlock blocks[2][2];  // [this, next][keys, values]
  alignas(
      64) float rows[kBlockRows * kMaxHeadDim];  // decoded, where one pass over them is not enough
};
constexpr int64_t HeadFloats(int head_dim) { return head_dim + kBlockRows; }

struct AttendTask {
  const RowSource* keys;
  const RowSource* values;
  SlotRange slots;
  int group;
  int head_dim;
  const float* q;  // [PaddedHeads(G), D], scaled and in the keys' space; 64-byte aligned
  AttendScratch* scratch;
  float* heads;   // [PaddedHeads(G), HeadFloats(D)], 64-byte aligned scratch
  float* states;  // [G, FlashState::floats(D)], overwritten
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_ATTENTION_H_

#if defined(SIKV_KERNELS_COMMON_SIMD_ATTENTION_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_ATTENTION_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_ATTENTION_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_ATTENTION_TARGET_
#endif

#include <math.h>

#include "hwy/contrib/math/math-inl.h"
#include "kernels/common/simd_rows.h"

#if HWY_TARGET != HWY_SCALAR

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

template <class D>
HWY_INLINE hn::Vec<DF4> SumBlocks(D d, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(d) == 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return SumBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// [a, b, c, d] summed over lanes.
HWY_INLINE hn::Vec<DF4> SumLanes(VF a, VF b, VF c, VF d) {
  const DF df;
  const hn::Repartition<double, DF> dd;
  const auto ab = hn::Add(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b));
  const auto cd = hn::Add(hn::InterleaveLower(df, c, d), hn::InterleaveUpper(df, c, d));
  const auto abd = hn::BitCast(dd, ab), cdd = hn::BitCast(dd, cd);
  const VF blocks = hn::Add(hn::BitCast(df, hn::InterleaveLower(dd, abd, cdd)),
                            hn::BitCast(df, hn::InterleaveUpper(dd, abd, cdd)));
  return SumBlocks(df, blocks);
}

HWY_INLINE void PrefetchRow(const uint8_t* row, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) hwy::Prefetch(row + line);
}

// Requests what opening and decoding row t of a block will read.
HWY_INLINE void PrefetchRow(const RowSource& source, const RowBlock& block, int t) {
  if (source.code.token_bytes < 128) PrefetchRow(block.code[t], static_cast<size_t>(source.code.token_bytes));
  if (source.sign.base != nullptr) {
    PrefetchRow(block.sign[t], static_cast<size_t>(source.sign.token_bytes));
  }
  if (source.scale.base != nullptr) hwy::Prefetch(block.scale_at[t]);
}

// logits [kHeads, kBlockRows] = q [kHeads, D] . rows, without the rows' scales. Requests `next`'s
// rows meanwhile.
template <RowFormat kFormat, int kHeads>
void BlockLogits(const RowSource& source, const RowBlock& block, const RowBlock& next,
                 const float* HWY_RESTRICT q, size_t head_dim, float* HWY_RESTRICT logits) {
  constexpr int kRows = 8 / kHeads;
  const DF d;
  const DF4 d4;
  alignas(64) float by_row[kBlockRows * kHeads];
  for (int t = 0; t < block.count; t += kRows) {
    for (int i = t; i < HWY_MIN(t + kRows, next.count); ++i) PrefetchRow(source, next, i);
    VF sums[8];
    for (VF& sum : sums) sum = hn::Zero(d);
    for (size_t c = 0; c < head_dim; c += kLanes) {
      VF rows[kRows];
      for (int i = 0; i < kRows; ++i) rows[i] = DecodeRow<kFormat>(source, block, t + i, c);
      for (int h = 0; h < kHeads; ++h) {
        const VF query = hn::Load(d, q + static_cast<size_t>(h) * head_dim + c);
        for (int i = 0; i < kRows; ++i) {
          sums[i * kHeads + h] = hn::MulAdd(query, rows[i], sums[i * kHeads + h]);
        }
      }
    }
    for (int i = 0; i < 8; i += 4) {
      hn::Store(SumLanes(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]), d4,
                by_row + t * kHeads + i);
    }
  }
  for (int t = 0; t < block.count; ++t) {
    for (int h = 0; h < kHeads; ++h) logits[h * kBlockRows + t] = by_row[t * kHeads + h];
  }
}

// acc [kHeads, D] = shrink [kHeads] * acc + weights [kHeads, kBlockRows] . rows.
template <RowFormat kFormat, int kHeads, int kVectors>
void SumValues(const RowSource& source, const RowBlock& block, const RowBlock& next,
               const float* HWY_RESTRICT weights, const float* HWY_RESTRICT shrink, size_t head_dim,
               float* HWY_RESTRICT acc) {
  const DF d;
  for (size_t c = 0; c < head_dim; c += kVectors * kLanes) {
    VF sums[kHeads][kVectors];
    for (int h = 0; h < kHeads; ++h) {
      const VF factor = hn::Set(d, shrink[h]);
      for (int v = 0; v < kVectors; ++v) {
        sums[h][v] =
            hn::Mul(factor, hn::Load(d, acc + static_cast<size_t>(h) * head_dim + c + v * kLanes));
      }
    }
    for (int t = 0; t < block.count; ++t) {
      if (c == 0 && t < next.count) PrefetchRow(source, next, t);
      VF weight[kHeads];
      for (int h = 0; h < kHeads; ++h) weight[h] = hn::Set(d, weights[h * kBlockRows + t]);
      for (int v = 0; v < kVectors; ++v) {
        const VF row = DecodeRow<kFormat>(source, block, t, c + v * kLanes);
        for (int h = 0; h < kHeads; ++h) sums[h][v] = hn::MulAdd(weight[h], row, sums[h][v]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVectors; ++v) {
        hn::Store(sums[h][v], d, acc + static_cast<size_t>(h) * head_dim + c + v * kLanes);
      }
    }
  }
}

template <RowFormat kFormat, int kHeads>
void BlockValues(const RowSource& source, const RowBlock& block, const RowBlock& next,
                 const float* weights, const float* shrink, size_t head_dim, float* acc) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;  // AVX2 has half the registers
  if (head_dim % (kMost * kLanes) == 0) {
    SumValues<kFormat, kHeads, kMost>(source, block, next, weights, shrink, head_dim, acc);
  } else {
    SumValues<kFormat, kHeads, 2>(source, block, next, weights, shrink, head_dim, acc);
  }
}

// rows [count, D] of an opened block, with their scales.
template <RowFormat kFormat>
void DecodeBlock(const RowSource& source, const RowBlock& block, const RowBlock& next,
                 size_t head_dim, float* HWY_RESTRICT rows) {
  const DF d;
  for (int t = 0; t < block.count; ++t) {
    if (t < next.count) PrefetchRow(source, next, t);
    for (size_t c = 0; c < head_dim; c += kLanes) {
      VF v = DecodeRow<kFormat>(source, block, t, c);
      if constexpr (IsScaled(kFormat)) v = hn::Mul(v, hn::Set(d, block.scale[t]));
      hn::Store(v, d, rows + static_cast<size_t>(t) * head_dim + c);
    }
  }
}

// The functions of one format; logits and values by PaddedHeads: 1, 2, 4.
struct RowOps {
  void (*open)(const RowSource&, size_t, RowBlock&);
  void (*decode)(const RowSource&, const RowBlock&, const RowBlock&, size_t, float*);
  void (*logits[3])(const RowSource&, const RowBlock&, const RowBlock&, const float*, size_t,
                    float*);
  void (*values[3])(const RowSource&, const RowBlock&, const RowBlock&, const float*, const float*,
                    size_t, float*);
};

template <RowFormat kFormat>
constexpr RowOps OpsOf() {
  RowOps ops{OpenRows<kFormat>, DecodeBlock<kFormat>, {}, {}};
  constexpr bool kRaw = kFormat <= RowFormat::kBf16;
  if constexpr (kRaw || IsSigned(kFormat)) {
    ops.logits[0] = BlockLogits<kFormat, 1>;
    ops.logits[1] = BlockLogits<kFormat, 2>;
    ops.logits[2] = BlockLogits<kFormat, 4>;
  }
  if constexpr (kRaw || !IsSigned(kFormat)) {
    ops.values[0] = BlockValues<kFormat, 1>;
    ops.values[1] = BlockValues<kFormat, 2>;
    ops.values[2] = BlockValues<kFormat, 4>;
  }
  return ops;
}

inline const RowOps& Ops(RowFormat format) {
  static constexpr RowOps kOps[] = {
      OpsOf<RowFormat::kFp32>(),    OpsOf<RowFormat::kFp16>(),         OpsOf<RowFormat::kBf16>(),
      OpsOf<RowFormat::kCoded2>(),  OpsOf<RowFormat::kCoded3>(),       OpsOf<RowFormat::kCoded4>(),
      OpsOf<RowFormat::kMinMax2>(), OpsOf<RowFormat::kSigned1>(),      OpsOf<RowFormat::kSigned2>(),
      OpsOf<RowFormat::kSigned3>(), OpsOf<RowFormat::kSignedMinMax2>()};
  return kOps[static_cast<int>(format)];
}

// Walks a SlotRange in blocks.
class SlotCursor {
 public:
  explicit SlotCursor(const SlotRange& range) : range_(range), at_(range.first) {
    if (range.listed == nullptr) {
      skip_ =
          std::lower_bound(range.skip.begin(), range.skip.end(), range.first) - range.skip.begin();
    }
  }

  // Fills slots [kBlockRows] and returns how many there are; 0 at the end.
  int next(int32_t* slots) {
    int n = 0;
    if (range_.listed != nullptr) {
      n = HWY_MIN(kBlockRows, range_.count - done_);
      memcpy(slots, range_.listed + done_, static_cast<size_t>(n) * sizeof *slots);
      done_ += n;
      return n;
    }
    const int32_t end = range_.first + range_.count;
    for (; n < kBlockRows && at_ < end; ++at_) {
      if (skip_ < std::ssize(range_.skip) && range_.skip[static_cast<size_t>(skip_)] == at_) {
        ++skip_;
      } else {
        slots[n++] = at_;
      }
    }
    return n;
  }

 private:
  SlotRange range_;
  int32_t done_ = 0, at_;
  int64_t skip_ = 0;
};

// Rows of one side of a task, block by block.
class RowStream {
 public:
  RowStream(const RowSource& source, size_t head_dim, int heads, float* rows)
      : source_(source),
        plain_{RowFormat::kFp32},
        head_dim_(head_dim),
        decodes_(source.format == RowFormat::kUnpacked || heads > kQuad),
        ops_(Ops(source.format == RowFormat::kUnpacked ? RowFormat::kFp32 : source.format)),
        rows_(rows) {}

  // Whether blocks are decoded to fp32 first, for want of a format or because they are read more
  // than once.
  const RowOps& ops() const { return decodes_ ? Ops(RowFormat::kFp32) : ops_; }
  const RowSource& source() const { return decodes_ ? plain_ : source_; }
  bool scaled() const { return !decodes_ && IsScaled(source_.format); }

  // Finds the rows of `slots`.
  void locate(const int32_t* slots, int count, RowBlock& block) const {
    block.count = count;
    if (source_.format == RowFormat::kUnpacked || count == 0) return;
    const int padded = (count + 7) / 8 * 8;
    int64_t pages[kBlockRows];
    uint32_t tokens[kBlockRows];
    for (int t = 0; t < padded; ++t) {
      const auto slot = static_cast<uint32_t>(slots[HWY_MIN(t, count - 1)]);
      const uint32_t page = slot / SIKV_PAGE_TOKENS;
      pages[t] = source_.page_table != nullptr ? source_.page_table[page] : page;
      tokens[t] = slot % SIKV_PAGE_TOKENS;
    }
    const auto in = [&](const RowPlane& plane, int t, uint32_t i) {
      return plane.base + pages[t] * plane.page_stride + i * plane.token_bytes;
    };
    for (int t = 0; t < padded; ++t) block.code[t] = in(source_.code, t, tokens[t]);
    if (source_.scale.base != nullptr) {
      for (int t = 0; t < padded; ++t) block.scale_at[t] = in(source_.scale, t, tokens[t]);
    }
    if (source_.sign.base != nullptr) {
      for (int t = 0; t < count; ++t) {
        block.sign[t] = in(source_.sign, t, tokens[t] / nibble_tile::kTileTokens);
        block.sign_shift[t] = tokens[t] % nibble_tile::kTileTokens * nibble_tile::kGroup;
      }
    }
  }

  void request(const RowBlock& block) const {
    if (source_.format == RowFormat::kUnpacked) return;
    for (int t = 0; t < block.count; ++t) PrefetchRow(source_, block, t);
  }

  // Makes a block ready for ops(); `next` is requested if that reads it.
  void open(const int32_t* slots, const RowBlock& next, RowBlock& block) const {
    if (source_.format == RowFormat::kUnpacked) {
      source_.unpack(source_.context, source_.row, slots, block.count, rows_);
    } else {
      ops_.open(source_, head_dim_, block);
      if (decodes_) ops_.decode(source_, block, next, head_dim_, rows_);
    }
    if (!decodes_) return;
    const int padded = (block.count + 7) / 8 * 8;
    for (int t = 0; t < padded; ++t) {
      const auto row = static_cast<size_t>(HWY_MIN(t, block.count - 1));
      block.code[t] = reinterpret_cast<const uint8_t*>(rows_ + row * head_dim_);
    }
  }

 private:
  const RowSource& source_;
  RowSource plain_;
  size_t head_dim_;
  bool decodes_;
  const RowOps& ops_;
  float* rows_;
};

// Turns a block's logits [kBlockRows] of one head into weights relative to the new maximum, in
// place. `m` and `l` are the head's FlashState; returns what the older weights shrink by.
HWY_INLINE float SoftmaxBlock(const float* key_scale, const float* value_scale, int count, float* m,
                              float* l, float* logits) {
  const DF d;
  VF highest = hn::Set(d, *m);
  const VF nothing = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (size_t t = 0; t < static_cast<size_t>(count); t += kLanes) {
    VF logit = hn::Load(d, logits + t);
    if (key_scale != nullptr) logit = hn::Mul(logit, hn::Load(d, key_scale + t));
    logit = hn::IfThenElse(hn::FirstN(d, static_cast<size_t>(count) - t), logit, nothing);
    hn::Store(logit, d, logits + t);
    highest = hn::Max(highest, logit);
  }
  const float largest = hn::GetLane(hn::MaxOfLanes(d, highest));
  const VF maximum = hn::Set(d, largest);
  VF sum = hn::Zero(d);
  for (size_t t = 0; t < static_cast<size_t>(count); t += kLanes) {
    VF weight = hn::Exp(d, hn::Sub(hn::Load(d, logits + t), maximum));
    sum = hn::Add(sum, weight);
    if (value_scale != nullptr) weight = hn::Mul(weight, hn::Load(d, value_scale + t));
    hn::Store(weight, d, logits + t);
  }
  const float shrink = largest == *m ? 1.0f : expf(*m - largest);
  *m = largest;
  *l = *l * shrink + hn::GetLane(hn::SumOfLanes(d, sum));
  return shrink;
}

// Fills task.states.
inline void AttendRows(const AttendTask& task) {
  const auto dim = static_cast<size_t>(task.head_dim);
  const int heads = PaddedHeads(task.group);
  const int pass = HWY_MIN(heads, kQuad), ways = pass == 4 ? 2 : pass - 1;
  float* const acc = task.heads;
  float* const weights = acc + heads * task.head_dim;
  std::fill_n(acc, heads * task.head_dim, 0.0f);
  for (int g = 0; g < task.group; ++g) {
    FlashState(task.states + g * FlashState::floats(task.head_dim), task.head_dim).reset();
  }

  const RowStream keys(*task.keys, dim, heads, task.scratch->rows);
  const RowStream values(*task.values, dim, heads, task.scratch->rows);
  SlotCursor cursor(task.slots);
  int32_t slots[2][kBlockRows];
  const auto locate = [&](int which) {
    const int count = cursor.next(slots[which]);
    keys.locate(slots[which], count, task.scratch->blocks[which][0]);
    values.locate(slots[which], count, task.scratch->blocks[which][1]);
    return count;
  };
  int count = locate(0);
  keys.request(task.scratch->blocks[0][0]);
  values.request(task.scratch->blocks[0][1]);
  RowBlock none;
  for (int which = 0; count > 0; which = 1 - which) {
    RowBlock& key_block = task.scratch->blocks[which][0];
    RowBlock& value_block = task.scratch->blocks[which][1];
    const int next = locate(1 - which);

    keys.open(slots[which], task.scratch->blocks[1 - which][0], key_block);
    for (int h = 0; h < heads; h += pass) {
      const bool requests = h == 0 && &keys.source() == task.keys;
      keys.ops().logits[ways](keys.source(), key_block,
                              requests ? task.scratch->blocks[1 - which][0] : none,
                              task.q + h * task.head_dim, dim, weights + h * kBlockRows);
    }
    values.open(slots[which], task.scratch->blocks[1 - which][1], value_block);
    for (int h = 0; h < heads; h += pass) {
      float shrink[kQuad] = {};
      for (int g = h; g < HWY_MIN(h + pass, task.group); ++g) {
        float* const state = task.states + g * FlashState::floats(task.head_dim);
        shrink[g - h] = SoftmaxBlock(keys.scaled() ? key_block.scale : nullptr,
                                     values.scaled() ? value_block.scale : nullptr, count, state,
                                     state + 1, weights + g * kBlockRows);
      }
      const bool requests = h == 0 && &values.source() == task.values;
      values.ops().values[ways](values.source(), value_block,
                                requests ? task.scratch->blocks[1 - which][1] : none,
                                weights + h * kBlockRows, shrink, dim, acc + h * task.head_dim);
    }
    count = next;
  }
  for (int g = 0; g < task.group; ++g) {
    float* const state = task.states + g * FlashState::floats(task.head_dim);
    std::copy_n(acc + g * task.head_dim, task.head_dim, FlashState(state, task.head_dim).acc());
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET != HWY_SCALAR
#endif  // SIKV_KERNELS_COMMON_SIMD_ATTENTION_TARGET_
