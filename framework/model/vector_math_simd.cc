// A decode step reads every weight once: at one row of x the loops below wait for memory. Four rows
// of weights go together, so that each load of x serves four, and request the four after them
// (weight_allocator.h has the numbers).

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "framework/model/vector_math_simd.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include <algorithm>
#include <cmath>

#include "framework/model/vector_math.h"
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "plugins/abi/sikv_abi.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::vector_math {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kCacheLine = 64;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// Weights as stored -> fp32, a vector or one at a time.
template <WeightType kType>
struct Stored;

template <>
struct Stored<WeightType::kFp32> {
  using Element = float;
  static HWY_INLINE VF Load(DF d, const Element* p) { return hn::LoadU(d, p); }
  static HWY_INLINE float Load1(Element x) { return x; }
};

template <>
struct Stored<WeightType::kFp16> {
  using Element = uint16_t;
  static HWY_INLINE VF Load(DF d, const Element* p) {
    const hn::Rebind<hwy::float16_t, DF> half;
    const hn::Rebind<uint16_t, DF> bits;
    return hn::PromoteTo(d, hn::BitCast(half, hn::LoadU(bits, p)));
  }
  static HWY_INLINE float Load1(Element x) { return sikv_load(&x, SIKV_FP16, 0); }
};

template <>
struct Stored<WeightType::kBf16> {
  using Element = uint16_t;
  static HWY_INLINE VF Load(DF d, const Element* p) {
    const hn::Rebind<uint32_t, DF> wide;
    const hn::Rebind<uint16_t, DF> bits;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(wide, hn::LoadU(bits, p))));
  }
  static HWY_INLINE float Load1(Element x) { return sikv_load(&x, SIKV_BF16, 0); }
};

// Without the row's scale.
template <>
struct Stored<WeightType::kInt8> {
  using Element = int8_t;
  static HWY_INLINE VF Load(DF d, const Element* p) {
    const hn::Rebind<int32_t, DF> wide;
    const hn::Rebind<int8_t, DF> narrow;
    return hn::ConvertTo(d, hn::PromoteTo(wide, hn::LoadU(narrow, p)));
  }
  static HWY_INLINE float Load1(Element x) { return static_cast<float>(x); }
};

// kR rows of weights from `row` times kN rows of x.
template <WeightType kType, int kR, int kN>
HWY_INLINE void MultiplyTile(const WeightMatrix& matrix, int64_t row, const float* HWY_RESTRICT x,
                             float* HWY_RESTRICT out, int64_t out_stride) {
  using Row = Stored<kType>;
  const DF d;
  const int64_t columns = matrix.columns, lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto* const weights = reinterpret_cast<const typename Row::Element*>(matrix.row(row));
  const int64_t ahead = row + 2 * kR <= matrix.rows ? kR * columns : 0;
  VF sums[kR][kN];
  for (auto& of_row : sums) {
    for (VF& sum : of_row) sum = hn::Zero(d);
  }
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) {
    VF inputs[kN];
    for (int i = 0; i < kN; ++i) inputs[i] = hn::LoadU(d, x + i * columns + c);
    const bool new_line = c * static_cast<int64_t>(sizeof *weights) % kCacheLine == 0;
    for (int r = 0; r < kR; ++r) {
      if (new_line) hwy::Prefetch(weights + ahead + r * columns + c);
      const VF w = Row::Load(d, weights + r * columns + c);
      for (int i = 0; i < kN; ++i) sums[r][i] = hn::MulAdd(w, inputs[i], sums[r][i]);
    }
  }
  for (int r = 0; r < kR; ++r) {
    const float scale =
        kType == WeightType::kInt8 ? matrix.scale[static_cast<size_t>(row + r)] : 1.0f;
    for (int i = 0; i < kN; ++i) {
      float sum = hn::GetLane(hn::SumOfLanes(d, sums[r][i]));
      for (int64_t rest = c; rest < columns; ++rest) {
        sum += Row::Load1(weights[r * columns + rest]) * x[i * columns + rest];
      }
      out[i * out_stride + row + r] = scale * sum;
    }
  }
}

template <WeightType kType, int kN>
HWY_INLINE void MultiplyType(const WeightMatrix& matrix, int64_t first, int64_t last,
                             const float* x, float* out, int64_t out_stride) {
  int64_t r = first;
  for (; r + 4 <= last; r += 4) MultiplyTile<kType, 4, kN>(matrix, r, x, out, out_stride);
  for (; r < last; ++r) MultiplyTile<kType, 1, kN>(matrix, r, x, out, out_stride);
}

template <int kN>
HWY_INLINE void MultiplyN(const WeightMatrix& matrix, int64_t first, int64_t last, const float* x,
                          float* out, int64_t out_stride) {
  switch (matrix.type) {
    case WeightType::kFp32:
      return MultiplyType<WeightType::kFp32, kN>(matrix, first, last, x, out, out_stride);
    case WeightType::kFp16:
      return MultiplyType<WeightType::kFp16, kN>(matrix, first, last, x, out, out_stride);
    case WeightType::kBf16:
      return MultiplyType<WeightType::kBf16, kN>(matrix, first, last, x, out, out_stride);
    case WeightType::kInt8:
      return MultiplyType<WeightType::kInt8, kN>(matrix, first, last, x, out, out_stride);
  }
}

void Multiply(const WeightMatrix& matrix, int64_t first, int64_t last, const float* x, int64_t n,
              float* out, int64_t out_stride) {
  switch (n) {
    case 1:
      return MultiplyN<1>(matrix, first, last, x, out, out_stride);
    case 2:
      return MultiplyN<2>(matrix, first, last, x, out, out_stride);
    case 3:
      return MultiplyN<3>(matrix, first, last, x, out, out_stride);
    default:
      return MultiplyN<4>(matrix, first, last, x, out, out_stride);
  }
}

template <WeightType kType>
HWY_INLINE void LoadType(const WeightMatrix& matrix, int64_t row, float* HWY_RESTRICT out) {
  using Row = Stored<kType>;
  const DF d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const float scale = kType == WeightType::kInt8 ? matrix.scale[static_cast<size_t>(row)] : 1.0f;
  const VF factor = hn::Set(d, scale);
  const auto* const weights = reinterpret_cast<const typename Row::Element*>(matrix.row(row));
  int64_t c = 0;
  for (; c + lanes <= matrix.columns; c += lanes) {
    hn::StoreU(hn::Mul(factor, Row::Load(d, weights + c)), d, out + c);
  }
  for (; c < matrix.columns; ++c) out[c] = scale * Row::Load1(weights[c]);
}

void LoadRow(const WeightMatrix& matrix, int64_t row, float* out) {
  switch (matrix.type) {
    case WeightType::kFp32:
      return LoadType<WeightType::kFp32>(matrix, row, out);
    case WeightType::kFp16:
      return LoadType<WeightType::kFp16>(matrix, row, out);
    case WeightType::kBf16:
      return LoadType<WeightType::kBf16>(matrix, row, out);
    case WeightType::kInt8:
      return LoadType<WeightType::kInt8>(matrix, row, out);
  }
}

float Largest(const float* HWY_RESTRICT x, int64_t n) {
  const DF d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  VF largest = hn::Set(d, x[0]);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) largest = hn::Max(largest, hn::LoadU(d, x + i));
  float result = hn::GetLane(hn::MaxOfLanes(d, largest));
  for (; i < n; ++i) result = std::max(result, x[i]);
  return result;
}

float ExpMinus(float* HWY_RESTRICT x, int64_t n, float shift) {
  const DF d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const VF by = hn::Set(d, shift);
  VF total = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VF e = hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), by));
    hn::StoreU(e, d, x + i);
    total = hn::Add(total, e);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, total));
  for (; i < n; ++i) sum += x[i] = std::exp(x[i] - shift);
  return sum;
}

void SiluMultiply(float* HWY_RESTRICT gate, const float* HWY_RESTRICT up, int64_t n) {
  const DF d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  // hn::Exp is defined up to 104; exp(88) rounds silu to 0 as well.
  const VF one = hn::Set(d, 1.0f), ceiling = hn::Set(d, 88.0f);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VF g = hn::LoadU(d, gate + i);
    const VF silu = hn::Div(g, hn::Add(one, hn::Exp(d, hn::Min(hn::Neg(g), ceiling))));
    hn::StoreU(hn::Mul(silu, hn::LoadU(d, up + i)), d, gate + i);
  }
  for (; i < n; ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv::vector_math
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv::vector_math {

HWY_EXPORT(Multiply);
HWY_EXPORT(LoadRow);
HWY_EXPORT(Largest);
HWY_EXPORT(ExpMinus);
HWY_EXPORT(SiluMultiply);

void multiply_rows(const WeightMatrix& matrix, int64_t first, int64_t last, const float* x,
                   int64_t n, float* out, int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(Multiply)(matrix, first, last, x, n, out, out_stride);
}
void load_row(const WeightMatrix& matrix, int64_t row, float* out) {
  HWY_DYNAMIC_DISPATCH(LoadRow)(matrix, row, out);
}
float largest(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(Largest)(x, n); }
float exp_minus(float* x, int64_t n, float shift) {
  return HWY_DYNAMIC_DISPATCH(ExpMinus)(x, n, shift);
}
void silu_multiply(float* gate, const float* up, int64_t n) {
  HWY_DYNAMIC_DISPATCH(SiluMultiply)(gate, up, n);
}

}  // namespace sikv::vector_math
#endif  // HWY_ONCE
