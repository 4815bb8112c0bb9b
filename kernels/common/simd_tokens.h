// Prompt rows for encoders: blocks of tokens as fp32, their sums in the fixed order of
// plugins/layouts/paged_sum.h, and the codebook of the index plane.
//
// Every sum is over tokens, one accumulator per channel, so vectors of channels give the bits of
// the scalar code.
//
// Include from a file that goes through hwy/foreach_target.h.

#ifndef SIKV_KERNELS_COMMON_SIMD_TOKENS_H_
#define SIKV_KERNELS_COMMON_SIMD_TOKENS_H_

#include <stddef.h>
#include <stdint.h>

#include "kernels/common/simd_rows.h"
#include "plugins/layouts/arithmetic.h"
#include "plugins/layouts/nibble_tile.h"
#include "plugins/layouts/paged_sum.h"

namespace sikv {

// Tokens of one (sequence, KV head) where they lie.
struct TokenRows {
  const uint8_t* data;  // token 0, [D] of dtype
  int64_t stride;       // bytes from one token to the next
  int32_t dtype;        // fp32, fp16 or bf16
  int count;

  const uint8_t* at(int t) const { return data + t * stride; }
  TokenRows part(int first, int n) const { return {at(first), stride, dtype, n}; }
};

// Tokens worked on at a time: as fp32, 8 KiB at D = 128, they stay in L1 from the first step to the
// last. Two tiles of the index plane; a multiple of every vector's lanes.
inline constexpr int kBlockTokens = 16;
// Tokens ahead of the one being read whose lines are requested: rows of a head are H * D apart, so
// every one or two of them begin another 4 KiB, where the hardware prefetcher stops.
inline constexpr int kPrefetchTokens = 16;

// x [kBlockTokens, D], and what a codec needs for each token.
struct alignas(64) TokenBlock {
  float x[kBlockTokens * kMaxHeadDim];
};

// SignCodebookFit's sums. Large: 70 KiB.
struct alignas(64) CodebookSums {
  static constexpr int kEntries = kMaxHeadDim / nibble_tile::kGroup * 16;

  double run[kEntries * nibble_tile::kGroup];    // [D/4, 16, 4] of this run of tokens
  double total[kEntries * nibble_tile::kGroup];  // of the runs before
  double magnitude_run[kMaxHeadDim], magnitude_total[kMaxHeadDim];
  uint32_t counts[kEntries];
  TokenBlock block;
};

// One bit per channel of a token: bit i of unit u is channel kUnit * u + i.
struct ChannelBits {
  uint32_t units[kMaxUnits];
};

alignas(64) inline constexpr float kNoMean[kMaxHeadDim] = {};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_TOKENS_H_

#if defined(SIKV_KERNELS_COMMON_SIMD_TOKENS_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef SIKV_KERNELS_COMMON_SIMD_TOKENS_TARGET_
#undef SIKV_KERNELS_COMMON_SIMD_TOKENS_TARGET_
#else
#define SIKV_KERNELS_COMMON_SIMD_TOKENS_TARGET_
#endif

#include <string.h>

#include <algorithm>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/common/simd_rows.h"

#if HWY_TARGET != HWY_SCALAR

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

using DD = hn::FixedTag<double, kLanes / 2>;

// ---- rows as they came --------------------------------------------------------------------------

// Requests the row kPrefetchTokens further on; there need not be one.
HWY_INLINE void PrefetchAhead(const TokenRows& rows, int t, size_t row_bytes) {
  const auto row = reinterpret_cast<uintptr_t>(rows.data) +
                   static_cast<uintptr_t>((t + kPrefetchTokens) * rows.stride);
  for (size_t line = 0; line < row_bytes; line += 64) {
    hwy::Prefetch(reinterpret_cast<const uint8_t*>(row + line));
  }
}

// Whether no token holds a number beyond `largest`, as bits without the sign (NaN and infinity
// come last).
template <typename T>
HWY_INLINE bool BitsUpTo(const TokenRows& rows, size_t head_dim, T magnitude, T largest) {
  const hn::FixedTag<T, kLanes> d;
  const auto mask = hn::Set(d, magnitude), limit = hn::Set(d, largest);
  auto seen = limit;
  for (int t = 0; t < rows.count; ++t) {
    const T* row = reinterpret_cast<const T*>(rows.at(t));
    PrefetchAhead(rows, t, head_dim * sizeof(T));
    for (size_t i = 0; i < head_dim; i += kLanes) {
      seen = hn::Max(seen, hn::And(hn::LoadU(d, row + i), mask));
    }
  }
  return hn::AllTrue(d, hn::Eq(seen, limit));
}

// is_storable (plugins/sdk/finite.h) of every number: up to 2^58, which fp16 does not reach.
inline bool AllStorable(const TokenRows& rows, size_t head_dim) {
  switch (rows.dtype) {
    case SIKV_FP16:
      return BitsUpTo<uint16_t>(rows, head_dim, 0x7fff, 0x7bff);
    case SIKV_BF16:
      return BitsUpTo<uint16_t>(rows, head_dim, 0x7fff, 0x5c80);
    default:
      return BitsUpTo<uint32_t>(rows, head_dim, 0x7fffffff, 0x5c800000);
  }
}

HWY_INLINE VF LoadChannels(const float* from) { return hn::LoadU(DF(), from); }
template <typename T>
HWY_INLINE VF LoadChannels(const T* from) {
  return hn::PromoteTo(DF(), hn::LoadU(hn::Rebind<T, DF>(), from));
}

template <typename T>
HWY_INLINE void LoadTokensAs(const TokenRows& rows, size_t head_dim, const float* HWY_RESTRICT mean,
                             float* HWY_RESTRICT x) {
  const DF d;
  for (int t = 0; t < rows.count; ++t, x += head_dim) {
    const T* row = reinterpret_cast<const T*>(rows.at(t));
    PrefetchAhead(rows, t, head_dim * sizeof(T));
    for (size_t i = 0; i < head_dim; i += kLanes) {
      hn::StoreU(hn::Sub(LoadChannels(row + i), hn::LoadU(d, mean + i)), d, x + i);
    }
  }
}

// x [rows.count, D] <- rows - mean. Less kNoMean a number stays as it is, -0 too.
inline void LoadTokens(const TokenRows& rows, size_t head_dim, const float* mean, float* x) {
  switch (rows.dtype) {
    case SIKV_FP16:
      return LoadTokensAs<hwy::float16_t>(rows, head_dim, mean, x);
    case SIKV_BF16:
      return LoadTokensAs<hwy::bfloat16_t>(rows, head_dim, mean, x);
    default:
      return LoadTokensAs<float>(rows, head_dim, mean, x);
  }
}

// ---- sums over tokens ---------------------------------------------------------------------------

// sum [D] += x [count, D], or |x|, token by token.
template <bool kMagnitudes>
HWY_INLINE void AddTokens(const float* HWY_RESTRICT x, int count, size_t head_dim,
                          double* HWY_RESTRICT sum) {
  const DD dd;
  const hn::Rebind<float, DD> df;
  constexpr size_t kHalf = kLanes / 2;
  const auto load = [&](const float* from) HWY_ATTR {
    const auto v = hn::LoadU(df, from);
    return hn::PromoteTo(dd, kMagnitudes ? hn::Abs(v) : v);
  };
  // Four sums at a time hide the latency of an addition; the 2 kLanes channels divide every D.
  for (size_t i = 0; i < head_dim; i += 4 * kHalf) {
    auto sum0 = hn::Load(dd, sum + i), sum1 = hn::Load(dd, sum + i + kHalf);
    auto sum2 = hn::Load(dd, sum + i + 2 * kHalf), sum3 = hn::Load(dd, sum + i + 3 * kHalf);
    for (int t = 0; t < count; ++t) {
      const float* from = x + static_cast<size_t>(t) * head_dim + i;
      sum0 = hn::Add(sum0, load(from));
      sum1 = hn::Add(sum1, load(from + kHalf));
      sum2 = hn::Add(sum2, load(from + 2 * kHalf));
      sum3 = hn::Add(sum3, load(from + 3 * kHalf));
    }
    hn::Store(sum0, dd, sum + i);
    hn::Store(sum1, dd, sum + i + kHalf);
    hn::Store(sum2, dd, sum + i + 2 * kHalf);
    hn::Store(sum3, dd, sum + i + 3 * kHalf);
  }
}

// total [n] += run [n]; run <- 0.
HWY_INLINE void CloseRun(size_t n, double* HWY_RESTRICT run, double* HWY_RESTRICT total) {
  const DD dd;
  for (size_t i = 0; i < n; i += kLanes / 2) {
    hn::Store(hn::Add(hn::Load(dd, total + i), hn::Load(dd, run + i)), dd, total + i);
    hn::Store(hn::Zero(dd), dd, run + i);
  }
}

// visit(rows of a block), and close_run() after every PagedSum::kRun tokens and at the end.
template <typename Visit, typename CloseRuns>
HWY_INLINE void ForEachBlock(const TokenRows& rows, Visit&& visit, CloseRuns&& close_run) {
  for (int first = 0; first < rows.count;) {
    const int end = std::min(rows.count, first + PagedSum::kRun);
    for (; first < end; first += kBlockTokens) {
      visit(rows.part(first, std::min(kBlockTokens, end - first)));
    }
    first = end;
    close_run();
  }
}

// channel_means: mean [D]. False, and mean untouched, where a number is not storable.
inline bool ChannelMeans(const TokenRows& rows, size_t head_dim, float* mean) {
  TokenBlock block;
  HWY_ALIGN double run[kMaxHeadDim] = {}, total[kMaxHeadDim] = {};
  bool storable = true;
  ForEachBlock(
      rows,
      [&](const TokenRows& part) HWY_ATTR {
        storable &= AllStorable(part, head_dim);
        LoadTokens(part, head_dim, kNoMean, block.x);
        AddTokens<false>(block.x, part.count, head_dim, run);
      },
      [&]() HWY_ATTR { CloseRun(head_dim, run, total); });
  if (!storable) return false;
  for (size_t d = 0; d < head_dim; ++d) {
    mean[d] = static_cast<float>(total[d] / static_cast<double>(rows.count));
  }
  return true;
}

// ---- signs --------------------------------------------------------------------------------------

// The bits of a mask, lowest lane first.
HWY_INLINE uint32_t MaskBits(hn::Mask<DF> mask) {
  uint8_t bytes[8];  // as many as StoreMaskBits asks for
  hn::StoreMaskBits(DF(), mask, bytes);
  if constexpr (kLanes == 16) return LoadBytes<uint16_t>(bytes);
  return bytes[0];
}

// Bits of the kUnit channels from `first` on; test(i) is the mask of kLanes channels from i on. In
// registers: bits that are written a vector at a time and read back as words wait for the stores.
template <typename Test>
HWY_INLINE uint32_t UnitBits(size_t first, const Test& test) {
  uint32_t bits = 0;
  for (size_t i = 0; i < kUnit; i += kLanes) bits |= MaskBits(test(first + i)) << i;
  return bits;
}

// Bit d: channel d is not negative (nibble_tile::sign_bit).
HWY_INLINE void SignBits(const float* x, size_t head_dim, ChannelBits* signs) {
  const DF d;
  for (size_t u = 0; u < head_dim / kUnit; ++u) {
    signs->units[u] = UnitBits(
        kUnit * u, [&](size_t i) HWY_ATTR { return hn::Ge(hn::LoadU(d, x + i), hn::Zero(d)); });
  }
}

// ---- the codebook -------------------------------------------------------------------------------

// Adds centred rows x [count, D].
inline void AddToCodebook(const float* x, int count, size_t head_dim, CodebookSums* sums) {
  constexpr size_t kDoubles = HWY_MIN(kLanes / 2, size_t{4});
  const hn::FixedTag<double, kDoubles> dd;
  const hn::Rebind<float, decltype(dd)> df;
  AddTokens<true>(x, count, head_dim, sums->magnitude_run);
  ChannelBits signs[kBlockTokens];
  for (int t = 0; t < count; ++t) {
    SignBits(x + static_cast<size_t>(t) * head_dim, head_dim, &signs[t]);
  }
  for (int t = 0; t < count; ++t) {
    for (size_t u = 0; u < head_dim / kUnit; ++u) {
      const uint32_t nibbles = signs[t].units[u];
      const float* from = x + static_cast<size_t>(t) * head_dim + kUnit * u;
      double* run = sums->run + kUnit * 16 * u;
      uint32_t* counts = sums->counts + kUnit / 4 * 16 * u;
      for (size_t g = 0; g < kUnit / 4; ++g) {
        const size_t entry = 16 * g + (nibbles >> (4 * g) & 15u);
        ++counts[entry];
        for (size_t i = 0; i < 4; i += kDoubles) {
          double* sum = run + 4 * entry + i;
          hn::Store(hn::Add(hn::Load(dd, sum), hn::PromoteTo(dd, hn::LoadU(df, from + 4 * g + i))),
                    dd, sum);
        }
      }
    }
  }
}

inline void ClearCodebook(size_t head_dim, CodebookSums* sums) {
  memset(sums->run, 0, 16 * head_dim * sizeof(double));
  memset(sums->total, 0, 16 * head_dim * sizeof(double));
  memset(sums->magnitude_run, 0, head_dim * sizeof(double));
  memset(sums->magnitude_total, 0, head_dim * sizeof(double));
  memset(sums->counts, 0, 4 * head_dim * sizeof(uint32_t));
}

HWY_INLINE void CloseCodebookRun(size_t head_dim, CodebookSums* sums) {
  CloseRun(16 * head_dim, sums->run, sums->total);
  CloseRun(head_dim, sums->magnitude_run, sums->magnitude_total);
}

// SignCodebookFit::finish: codebook [D/4, 16, 4].
inline void FinishCodebook(const CodebookSums& sums, int count, size_t head_dim, float* codebook) {
  for (size_t entry = 0; entry < 4 * head_dim; ++entry) {
    for (size_t i = 0; i < 4; ++i) {
      const double magnitude = sums.magnitude_total[entry / 16 * 4 + i] / count;
      codebook[4 * entry + i] = static_cast<float>(
          sums.counts[entry] != 0 ? sums.total[4 * entry + i] / sums.counts[entry]
          : (entry >> i & 1) != 0 ? magnitude
                                  : -magnitude);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET != HWY_SCALAR
#endif  // SIKV_KERNELS_COMMON_SIMD_TOKENS_TARGET_
