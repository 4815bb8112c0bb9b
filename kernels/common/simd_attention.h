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
#include "kernels/common/prefetch.h"
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
// Floats per task for the sums of values, logits, maxima and sums of weights of all heads.
constexpr int64_t HeadFloats(int group, int head_dim) {
  const int64_t heads = PaddedHeads(group);
  return heads * (head_dim + kBlockRows) + 2 * std::max<int64_t>(heads, kQuad);
}

struct AttendTask {
  const RowSource* keys;
  const RowSource* values;
  SlotRange slots;
  int group;
  int head_dim;
  const float* q;  // [PaddedHeads(G), D], scaled and in the keys' space; 64-byte aligned
  AttendScratch* scratch;
  float* heads;   // [HeadFloats(G, D)] scratch; 64-byte aligned
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

struct Sum {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Add(a, b);
  }
};
struct Largest {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Max(a, b);
  }
};

template <class Op, class D>
HWY_INLINE hn::Vec<DF4> ReduceBlocks(Op op, D d, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(d) == 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return ReduceBlocks(op, half, op(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// [a, b, c, d], each reduced over its lanes.
template <class Op>
HWY_INLINE hn::Vec<DF4> ReduceLanes(Op op, VF a, VF b, VF c, VF d) {
  const DF df;
  const hn::Repartition<double, DF> dd;
  const auto ab = hn::BitCast(dd, op(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b)));
  const auto cd = hn::BitCast(dd, op(hn::InterleaveLower(df, c, d), hn::InterleaveUpper(df, c, d)));
  return ReduceBlocks(op, df,
                      op(hn::BitCast(df, hn::InterleaveLower(dd, ab, cd)),
                         hn::BitCast(df, hn::InterleaveUpper(dd, ab, cd))));
}

// The lines that start in bytes [begin, end) of a row.
HWY_INLINE void PrefetchLines(const uint8_t* row, size_t begin, size_t end) {
  for (size_t line = (begin + 63) / 64 * 64; line < end; line += 64) PrefetchLine(row + line);
}

// Requests what opening and decoding channels [begin, end) of row t of a block will read; what the
// row has as a whole goes with channel 0.
HWY_INLINE void PrefetchRow(const RowSource& source, const RowBlock& block, int t, size_t begin,
                            size_t end, size_t head_dim) {
  const auto bytes = static_cast<size_t>(source.code.token_bytes);
  PrefetchLines(block.code[t], begin * bytes / head_dim, end * bytes / head_dim);
  if (begin != 0) return;
  if (source.sign.base != nullptr) {
    PrefetchLines(block.sign[t], 0, static_cast<size_t>(source.sign.token_bytes));
  }
  // A row that has its own signs has its own scale in the same line.
  if (source.scale.base != nullptr && source.own_signs == 0) PrefetchLine(block.scale_at[t]);
}
HWY_INLINE void PrefetchRow(const RowSource& source, const RowBlock& block, int t) {
  PrefetchRow(source, block, t, 0, 1, 1);
}

// logits [kHeads, kBlockRows] = q [kHeads, D] . rows, without the rows' scales. Requests `next`'s
// rows meanwhile.
template <RowFormat kFormat, int kHeads>
void BlockLogits(const RowSource& source, const RowBlock& block, const RowBlock& next,
                 const float* HWY_RESTRICT q, size_t head_dim, float* HWY_RESTRICT logits) {
  constexpr int kSums = kLanes == 16 ? 16 : 8;  // AVX2 has half the registers
  constexpr int kRows = kSums / kHeads;
  const DF d;
  const DF4 d4;
  alignas(64) float by_row[kBlockRows * kHeads];
  for (int t = 0; t < block.count; t += kRows) {
    for (int i = t; i < HWY_MIN(t + kRows, next.count); ++i) PrefetchRow(source, next, i);
    VF sums[kSums];
    for (VF& sum : sums) sum = hn::Zero(d);
    for (size_t unit = 0; unit < head_dim; unit += kUnit) {
      for (size_t c = unit; c < unit + kUnit; c += kLanes) {
        VF query[kHeads];
        for (int h = 0; h < kHeads; ++h) {
          query[h] = hn::Load(d, q + static_cast<size_t>(h) * head_dim + c);
        }
        for (int i = 0; i < kRows; ++i) {
          const VF row = DecodeRow<kFormat>(source, block, t + i, c);
          for (int h = 0; h < kHeads; ++h) {
            sums[i * kHeads + h] = hn::MulAdd(query[h], row, sums[i * kHeads + h]);
          }
        }
      }
    }
    for (int i = 0; i < kSums; i += 4) {
      hn::Store(ReduceLanes(Sum(), sums[i], sums[i + 1], sums[i + 2], sums[i + 3]), d4,
                by_row + t * kHeads + i);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int t = 0; t < block.count; ++t) logits[h * kBlockRows + t] = by_row[t * kHeads + h];
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
      if (t < next.count) PrefetchRow(source, next, t, c, c + kVectors * kLanes, head_dim);
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
    const bool scales = source_.scale.base != nullptr, signs = source_.sign.base != nullptr;
    // volatile: GCC would vectorise the loop and spend thrice the time on gathering by hand.
    const volatile int32_t* const page_table = source_.page_table;
    for (int t = 0; t < PaddedRows(count); ++t) {
      const auto slot = static_cast<uint32_t>(slots[HWY_MIN(t, count - 1)]);
      const uint32_t token = slot % SIKV_PAGE_TOKENS;
      int64_t page = slot / SIKV_PAGE_TOKENS;
      if (page_table != nullptr) page = page_table[page];
      const auto in = [&](const RowPlane& plane, uint32_t i) {
        return plane.base + page * plane.page_stride + i * plane.token_bytes;
      };
      block.code[t] = in(source_.code, token);
      if (scales) block.scale_at[t] = in(source_.scale, token);
      if (signs) {
        block.sign[t] = in(source_.sign, token / nibble_tile::kTileTokens);
        block.sign_shift[t] =
            static_cast<int>(token % nibble_tile::kTileTokens * nibble_tile::kGroup);
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
    for (int t = 0; t < PaddedRows(block.count); ++t) {
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

// Turns a block's logits [kHeads, kBlockRows] into weights relative to the heads' new maxima, in
// place. m and l [4] are the heads' running maximum and sum of weights, shrink [4] is what older
// weights are to be multiplied with. The heads go together: reductions over lanes, one head after
// the other, are a chain of latencies that costs as much as the rest.
template <int kHeads>
void SoftmaxBlock(const float* key_scale, const float* value_scale, int count,
                  float* HWY_RESTRICT logits, float* HWY_RESTRICT m, float* HWY_RESTRICT l,
                  float* HWY_RESTRICT shrink) {
  const DF d;
  const DF4 d4;
  const auto n = static_cast<size_t>(count);
  const VF nothing = hn::Set(d, -std::numeric_limits<float>::infinity());
  VF tops[kQuad], sums[kQuad];
  for (int h = 0; h < kHeads; ++h) {
    tops[h] = nothing;
    for (size_t t = 0; t < n; t += kLanes) {
      float* const at = logits + h * kBlockRows + t;
      VF logit = hn::Load(d, at);
      if (key_scale != nullptr) logit = hn::Mul(logit, hn::Load(d, key_scale + t));
      if (n - t < kLanes) logit = hn::IfThenElse(hn::FirstN(d, n - t), logit, nothing);
      hn::Store(logit, d, at);
      tops[h] = hn::Max(tops[h], logit);
    }
  }
  for (int h = kHeads; h < kQuad; ++h) tops[h] = tops[0];
  const auto before = hn::Load(d4, m);
  const auto maxima = hn::Max(before, ReduceLanes(Largest(), tops[0], tops[1], tops[2], tops[3]));
  const auto factors = hn::Exp(d4, hn::Sub(before, maxima));
  hn::Store(maxima, d4, m);
  hn::Store(factors, d4, shrink);
  for (int h = 0; h < kHeads; ++h) {
    const VF maximum = hn::Set(d, m[h]);
    sums[h] = hn::Zero(d);
    for (size_t t = 0; t < n; t += kLanes) {
      float* const at = logits + h * kBlockRows + t;
      VF weight = hn::Exp(d, hn::Sub(hn::Load(d, at), maximum));
      sums[h] = hn::Add(sums[h], weight);
      if (value_scale != nullptr) weight = hn::Mul(weight, hn::Load(d, value_scale + t));
      hn::Store(weight, d, at);
    }
  }
  for (int h = kHeads; h < kQuad; ++h) sums[h] = sums[0];
  hn::Store(
      hn::MulAdd(hn::Load(d4, l), factors, ReduceLanes(Sum(), sums[0], sums[1], sums[2], sums[3])),
      d4, l);
}

// Fills task.states.
inline void AttendRows(const AttendTask& task) {
  const auto dim = static_cast<size_t>(task.head_dim);
  const int heads = PaddedHeads(task.group);
  const int pass = HWY_MIN(heads, kQuad), ways = pass == kQuad ? 2 : pass - 1;
  constexpr decltype(&SoftmaxBlock<1>) kSoftmax[] = {SoftmaxBlock<1>, SoftmaxBlock<2>,
                                                     SoftmaxBlock<kQuad>};
  const int quads = HWY_MAX(heads, kQuad);             // reductions take four heads at a time
  float* const acc = task.heads;                       // [heads, D]
  float* const weights = acc + heads * task.head_dim;  // [heads, kBlockRows]
  float* const maxima = weights + heads * kBlockRows;  // [quads]
  float* const totals = maxima + quads;                // [quads]
  std::fill_n(acc, heads * task.head_dim, 0.0f);
  std::fill_n(maxima, quads, -std::numeric_limits<float>::infinity());
  std::fill_n(totals, quads, 0.0f);

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
      alignas(16) float shrink[kQuad];
      kSoftmax[ways](keys.scaled() ? key_block.scale : nullptr,
                     values.scaled() ? value_block.scale : nullptr, count, weights + h * kBlockRows,
                     maxima + h, totals + h, shrink);
      const bool requests = h == 0 && &values.source() == task.values;
      values.ops().values[ways](values.source(), value_block,
                                requests ? task.scratch->blocks[1 - which][1] : none,
                                weights + h * kBlockRows, shrink, dim, acc + h * task.head_dim);
    }
    count = next;
  }
  for (int g = 0; g < task.group; ++g) {
    float* const state = task.states + g * FlashState::floats(task.head_dim);
    state[0] = maxima[g];
    state[1] = totals[g];
    std::copy_n(acc + g * task.head_dim, task.head_dim, FlashState(state, task.head_dim).acc());
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET != HWY_SCALAR
#endif  // SIKV_KERNELS_COMMON_SIMD_ATTENTION_TARGET_
