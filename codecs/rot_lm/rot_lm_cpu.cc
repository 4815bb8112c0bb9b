// rot_lm with SIMD, in blocks of tokens: centre and rotate; r of every token; levels; scales.
//
// Levels need no division per channel: |y| / r, rounded, is above a boundary b where |y| is above a
// limit that belongs to (r, b), found by trying the floats next to r * b. rounded(x / r) <= b holds
// for x up to r (b + ulp(b) / 2), at most one ulp beyond r * b; so the last such x is one of
// rounded(r * b), the float below and the float above.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "codecs/rot_lm/rot_lm_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "codecs/rot_lm/rot_lm.h"
#include "kernels/common/level_tables.h"
#include "kernels/common/simd_pack.h"
#include "kernels/common/simd_rotate_rows.h"
#include "kernels/common/simd_rows.h"
#include "kernels/common/simd_tokens.h"

#ifndef SIKV_CODECS_ROT_LM_ROT_LM_CPU_CC_
#define SIKV_CODECS_ROT_LM_ROT_LM_CPU_CC_

namespace sikv {

// The functions of one target. Rows go to `token` and those behind it in a page, and unpack reads
// `token`. What returns bool says whether all rows are storable.
struct RotLmSimd {
  bool (*means)(const TokenRows& rows, size_t head_dim, float* mean);
  void (*fit)(const TokenRows& rows, size_t head_dim, const float* mean, CodebookSums* sums,
              float* codebook);
  bool (*pack_keys)(const TokenRows& rows, const rlm4::Params& params, const float* mean,
                    const rlm4::KeyPage& page, int token);
  bool (*pack_values)(const TokenRows& rows, const rlm4::Params& params, const float* mean,
                      const rlm4::ValuePage& page, int token);
  void (*unpack_key)(const rlm4::Params& params, const float* mean, const rlm4::KeyPage& page,
                     int token, float* x);
  void (*unpack_value)(const rlm4::Params& params, const float* mean, const rlm4::ValuePage& page,
                       int token, float* x);
};

}  // namespace sikv

#endif  // SIKV_CODECS_ROT_LM_ROT_LM_CPU_CC_

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

#if HWY_TARGET != HWY_SCALAR

// ---- fit ----------------------------------------------------------------------------------------

// x [rows.count, D] <- R (rows - mean).
HWY_INLINE void LoadRotated(const TokenRows& rows, size_t head_dim, const float* mean, float* x) {
  LoadTokens(rows, head_dim, mean, x);
  RotateRows<false>(head_dim, rows.count, x);
}

void FitRows(const TokenRows& rows, size_t head_dim, const float* mean, CodebookSums* sums,
             float* codebook) {
  ClearCodebook(head_dim, sums);
  ForEachBlock(
      rows,
      [&](const TokenRows& part) HWY_ATTR {
        LoadRotated(part, head_dim, mean, sums->block.x);
        AddToCodebook(sums->block.x, part.count, head_dim, sums);
      },
      [&]() HWY_ATTR { CloseCodebookRun(head_dim, sums); });
  FinishCodebook(*sums, rows.count, head_dim, codebook);
}

// ---- encode -------------------------------------------------------------------------------------

// sum_folded over a vector's lanes.
template <size_t kHalf = kLanes / 2>
HWY_INLINE float FoldLanes(VF v) {
  if constexpr (kHalf == 0) {
    return hn::GetLane(v);
  } else {
    return FoldLanes<kHalf / 2>(hn::Add(v, SwapLanes<kHalf>(v)));
  }
}

// |a * b| [kVectors] in vectors, folded until kLeft are left; vector i of these.
template <size_t kVectors, size_t kLeft>
HWY_INLINE VF FoldedProducts(const float* a, const float* b, size_t i) {
  if constexpr (kLeft == kVectors) {
    const DF d;
    return hn::Abs(hn::Mul(hn::Load(d, a + i * kLanes), hn::Load(d, b + i * kLanes)));
  } else {
    return hn::Add(FoldedProducts<kVectors, 2 * kLeft>(a, b, i),
                   FoldedProducts<kVectors, 2 * kLeft>(a, b, i + kLeft));
  }
}

// sum_folded of |a * b| [kDim].
template <size_t kDim>
HWY_NOINLINE float SumProductsOf(const float* a, const float* b) {
  constexpr size_t kVectors = kDim / kLanes;
  if constexpr (kVectors % 3 != 0) {
    return FoldLanes(FoldedProducts<kVectors, 1>(a, b, 0));
  } else {  // D = 96: three vectors are left, whose numbers fold on below a vector's lanes
    float rest[3 * kLanes];
    for (size_t i = 0; i < 3; ++i) {
      hn::StoreU(FoldedProducts<kVectors, 3>(a, b, i), DF(), rest + i * kLanes);
    }
    return sum_folded(rest, 3 * kLanes);
  }
}
HWY_INLINE float SumProducts(size_t head_dim, const float* a, const float* b) {
  switch (head_dim) {
    case 64:
      return SumProductsOf<64>(a, b);
    case 96:
      return SumProductsOf<96>(a, b);
    case 128:
      return SumProductsOf<128>(a, b);
    default:
      return SumProductsOf<256>(a, b);
  }
}

// Tokens of a block on their way to codes.
struct alignas(64) LevelBlock {
  static constexpr int kMaxBoundaries = 7;

  TokenBlock rows;                              // y
  float square[kBlockTokens], r[kBlockTokens];  // sum of y^2; rms
  float limit[kMaxBoundaries][kBlockTokens];    // level i ends here
  float dot[kBlockTokens], norm[kBlockTokens];  // of |y| and the levels' values; of those
  ChannelBits signs[kBlockTokens];
};

template <int kBits>
HWY_INLINE void FindLimits(size_t head_dim, LevelBlock* block) {
  const DF d;
  const DU du;
  const VF dim = hn::Set(d, static_cast<float>(head_dim));
  for (size_t t = 0; t < kBlockTokens; t += kLanes) {
    const VF r = hn::Sqrt(hn::Div(hn::Load(d, block->square + t), dim));
    hn::Store(r, d, block->r + t);
    for (int i = 0; i < rlm4::num_levels(kBits) - 1; ++i) {
      const VF boundary = hn::Set(d, rlm4::level_boundary(kBits, i));
      const VF near = hn::Mul(r, boundary);
      const VU bits = hn::BitCast(du, near);
      const VF below = hn::BitCast(d, hn::Sub(bits, hn::Set(du, 1)));
      const VF above = hn::BitCast(d, hn::Add(bits, hn::Set(du, 1)));
      VF limit = hn::IfThenElse(hn::Le(hn::Div(near, r), boundary), near, below);
      limit = hn::IfThenElse(hn::Le(hn::Div(above, r), boundary), above, limit);
      // Squares too small for fp32 leave r = 0, and level 0.
      limit = hn::IfThenElse(hn::Gt(r, hn::Zero(d)), limit, hn::Inf(d));
      hn::Store(limit, d, block->limit[i] + t);
    }
  }
}

// Signs and levels of token t, its sums for the scale; store(unit, signs, planes of the levels).
template <int kBits, typename Store>
HWY_INLINE void FindLevels(size_t head_dim, int t, LevelBlock* block, const Store& store) {
  constexpr int kBoundaries = rlm4::num_levels(kBits) - 1;
  const DF d;
  const float* HWY_RESTRICT y = block->rows.x + static_cast<size_t>(t) * head_dim;
  HWY_ALIGN float value[kMaxHeadDim];
  VF limits[kBoundaries];
  for (int b = 0; b < kBoundaries; ++b) limits[b] = hn::Set(d, block->limit[b][t]);
  for (size_t u = 0; u < head_dim / kUnit; ++u) {
    uint32_t signs = 0, passed[kBoundaries] = {}, planes[kBits - 1];
    for (size_t i = 0; i < kUnit; i += kLanes) {
      const VF v = hn::Load(d, y + kUnit * u + i), a = hn::Abs(v);
      VF level = hn::Set(d, rlm4::level_value(kBits, 0));
      signs |= MaskBits(hn::Ge(v, hn::Zero(d))) << i;
      for (int b = 0; b < kBoundaries; ++b) {
        const auto beyond = hn::Gt(a, limits[b]);
        level = hn::IfThenElse(beyond, hn::Set(d, rlm4::level_value(kBits, b + 1)), level);
        passed[b] |= MaskBits(beyond) << i;
      }
      hn::Store(level, d, value + kUnit * u + i);
    }
    CountThresholds<kBits - 1>(passed, planes);
    store(u, signs, planes);
  }
  block->dot[t] = SumProducts(head_dim, y, value);
  block->norm[t] = SumProducts(head_dim, value, value);
}

// The scales of `count` tokens, fp16, `stride` bytes apart.
HWY_INLINE void StoreScales(const LevelBlock& block, int count, size_t stride, uint8_t* scales) {
  const DF d;
  const hn::Rebind<uint16_t, DF> d16;
  alignas(64) uint16_t narrow[kBlockTokens];
  for (size_t t = 0; t < kBlockTokens; t += kLanes) {
    const VF ratio = hn::Div(hn::Load(d, block.dot + t), hn::Load(d, block.norm + t));
    const VF scale = hn::IfThenElseZero(hn::Gt(hn::Load(d, block.r + t), hn::Zero(d)), ratio);
    const VU bits = NarrowSaturated<5, 10>(scale, minmax::largest_finite(SIKV_FP16));
    hn::Store(hn::TruncateTo(d16, bits), d16, narrow + t);
  }
  for (size_t t = 0; t < static_cast<size_t>(count); ++t) {
    memcpy(scales + stride * t, narrow + t, sizeof(uint16_t));
  }
}

// Signs, levels and scales of a block; store(token, unit, signs, planes of the levels). False if
// not all rows are storable.
template <int kBits, typename Store>
HWY_INLINE bool QuantiseBlock(const TokenRows& rows, size_t head_dim, const float* mean,
                              size_t scale_stride, uint8_t* scales, LevelBlock* block,
                              const Store& store) {
  const bool storable = AllStorable(rows, head_dim);
  LoadRotated(rows, head_dim, mean, block->rows.x);
  for (int t = 0; t < rows.count; ++t) {
    const float* y = block->rows.x + static_cast<size_t>(t) * head_dim;
    block->square[t] = SumProducts(head_dim, y, y);
  }
  FindLimits<kBits>(head_dim, block);
  for (int t = 0; t < rows.count; ++t) {
    FindLevels<kBits>(head_dim, t, block,
                      [&](size_t u, uint32_t signs, const uint32_t* planes)
                          HWY_ATTR { store(t, u, signs, planes); });
  }
  StoreScales(*block, rows.count, scale_stride, scales);
  return storable;
}

// Bytes from one token's scale to the next one's.
HWY_INLINE size_t ScaleStride(int line) { return static_cast<size_t>(rlm4::scale_stride(line)); }

template <int kBits>
bool PackKeysOf(const TokenRows& rows, size_t head_dim, const float* mean,
                const rlm4::KeyPage& page, int token) {
  const size_t bytes = page.line > 0 ? static_cast<size_t>(page.line) : head_dim * (kBits - 1) / 8;
  const size_t stride = ScaleStride(page.line), signs_at = head_dim * (kBits - 1) / 8;
  constexpr size_t kUnitBytes = kUnit * (kBits - 1) / 8;
  LevelBlock block = {};
  bool storable = true;
  for (int first = 0; first < rows.count; first += kBlockTokens) {
    const TokenRows part = rows.part(first, HWY_MIN(kBlockTokens, rows.count - first));
    const auto at = static_cast<size_t>(token + first);
    uint8_t* levels = page.magnitude + bytes * at;
    storable &=
        QuantiseBlock<kBits>(part, head_dim, mean, stride, page.scale + stride * at, &block,
                             [&](int t, size_t u, uint32_t signs, const uint32_t* planes) HWY_ATTR {
                               block.signs[t].units[u] = signs;
                               uint8_t* const row = levels + bytes * static_cast<size_t>(t);
                               StorePlanes<kBits - 1>(planes, row + kUnitBytes * u);
                               if (page.line > 0)
                                 memcpy(row + signs_at + kUnit / 8 * u, &signs, sizeof signs);
                             });
    StoreSigns(block.signs, token + first, part.count, head_dim, page.index);
  }
  return storable;
}

template <int kBits>
bool PackValuesOf(const TokenRows& rows, size_t head_dim, const float* mean,
                  const rlm4::ValuePage& page, int token) {
  const size_t bytes = head_dim * kBits / 8, stride = ScaleStride(page.line);
  constexpr size_t kUnitBytes = kUnit * kBits / 8;
  LevelBlock block = {};
  bool storable = true;
  for (int first = 0; first < rows.count; first += kBlockTokens) {
    const TokenRows part = rows.part(first, HWY_MIN(kBlockTokens, rows.count - first));
    const auto at = static_cast<size_t>(token + first);
    uint8_t* codes = page.code + bytes * at;
    storable &= QuantiseBlock<kBits>(
        part, head_dim, mean, stride, page.scale + stride * at, &block,
        [&](int t, size_t u, uint32_t signs, const uint32_t* planes) HWY_ATTR {
          uint32_t code[kBits];
          std::copy_n(planes, kBits - 1, code);
          code[kBits - 1] = signs;
          StorePlanes<kBits>(code, codes + bytes * static_cast<size_t>(t) + kUnitBytes * u);
        });
  }
  return storable;
}

bool PackKeys(const TokenRows& rows, const rlm4::Params& params, const float* mean,
              const rlm4::KeyPage& page, int token) {
  const auto head_dim = static_cast<size_t>(params.head_dim);
  switch (params.bits) {
    case 2:
      return PackKeysOf<2>(rows, head_dim, mean, page, token);
    case 3:
      return PackKeysOf<3>(rows, head_dim, mean, page, token);
    default:
      return PackKeysOf<4>(rows, head_dim, mean, page, token);
  }
}
bool PackValues(const TokenRows& rows, const rlm4::Params& params, const float* mean,
                const rlm4::ValuePage& page, int token) {
  const auto head_dim = static_cast<size_t>(params.head_dim);
  switch (params.bits) {
    case 2:
      return PackValuesOf<2>(rows, head_dim, mean, page, token);
    case 3:
      return PackValuesOf<3>(rows, head_dim, mean, page, token);
    default:
      return PackValuesOf<4>(rows, head_dim, mean, page, token);
  }
}

// ---- decode -------------------------------------------------------------------------------------

// x [D] <- R^T x + mean.
HWY_INLINE void Unrotate(size_t head_dim, const float* HWY_RESTRICT mean, float* HWY_RESTRICT x) {
  const DF d;
  RotateRows<true>(head_dim, 1, x);
  for (size_t i = 0; i < head_dim; i += kLanes) {
    hn::StoreU(hn::Add(hn::LoadU(d, x + i), hn::LoadU(d, mean + i)), d, x + i);
  }
}

// x [D] <- what codes of kBits bits stand for, times the token's scale.
template <int kBits>
HWY_INLINE void LookUpCodes(const uint8_t* row, const float* table, float scale, size_t head_dim,
                            float* x) {
  const DF d;
  for (size_t i = 0; i < head_dim; i += kLanes) {
    const VF v = Lookup<kBits>(table, UnpackCodes<kBits>(row, i));
    hn::StoreU(hn::Mul(v, hn::Set(d, scale)), d, x + i);
  }
}

void UnpackKey(const rlm4::Params& params, const float* mean, const rlm4::KeyPage& page, int token,
               float* x) {
  const DF d;
  const auto head_dim = static_cast<size_t>(params.head_dim);
  const uint8_t* row = rlm4::key_row(params, page, token);
  const float scale = rlm4::token_scale(page.scale, token, page.line);
  uint32_t negative[kMaxUnits];
  if (page.line > 0) {
    LoadSigns(row + rlm4::line_signs(params.head_dim), head_dim, negative);
  } else {
    UnpackTokenSigns(page.index, token, head_dim, negative);
  }
  switch (params.bits) {
    case 2:
      LookUpCodes<1>(row, level_tables::kLevels[2 - 2].data(), scale, head_dim, x);
      break;
    case 3:
      LookUpCodes<2>(row, level_tables::kLevels[3 - 2].data(), scale, head_dim, x);
      break;
    default:
      LookUpCodes<3>(row, level_tables::kLevels[4 - 2].data(), scale, head_dim, x);
      break;
  }
  for (size_t i = 0; i < head_dim; i += kLanes) {
    hn::StoreU(ApplySigns(hn::LoadU(d, x + i), &negative[i / kUnit], i % kUnit), d, x + i);
  }
  Unrotate(head_dim, mean, x);
}

void UnpackValue(const rlm4::Params& params, const float* mean, const rlm4::ValuePage& page,
                 int token, float* x) {
  const auto head_dim = static_cast<size_t>(params.head_dim);
  const uint8_t* row = page.code + int64_t{rlm4::value_code_bytes(params)} * token;
  const float scale = rlm4::token_scale(page.scale, token, page.line);
  switch (params.bits) {
    case 2:
      LookUpCodes<2>(row, level_tables::kSignedLevels[2 - 2].data(), scale, head_dim, x);
      break;
    case 3:
      LookUpCodes<3>(row, level_tables::kSignedLevels[3 - 2].data(), scale, head_dim, x);
      break;
    default:
      LookUpCodes<4>(row, level_tables::kSignedLevels[4 - 2].data(), scale, head_dim, x);
      break;
  }
  Unrotate(head_dim, mean, x);
}

#endif

const RotLmSimd* TargetRotLmSimd() {
#if HWY_TARGET == HWY_SCALAR
  return nullptr;
#else
  static constexpr RotLmSimd kSimd = {ChannelMeans, FitRows,   PackKeys,
                                      PackValues,   UnpackKey, UnpackValue};
  return &kSimd;
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include "kernels/common/simd_codec.h"

namespace sikv {

HWY_EXPORT(TargetRotLmSimd);

namespace {

const RotLmSimd* rot_lm_simd() { return HWY_DYNAMIC_DISPATCH(TargetRotLmSimd)(); }

class RotLmKeysCpu final : public SimdCodec {
 public:
  explicit RotLmKeysCpu(const CreateArgs& args)
      : SimdCodec(args, SIKV_KEY_CODEC, make_rot_lm_keys_ref(args)),
        params_(rlm4::read_params(layout_view())),
        line_(rlm4::read_line(layout_view())),
        fit_tokens_(static_cast<int>(args.options.integer("fit_tokens"))) {}

 protected:
  int fit_tokens() const override { return fit_tokens_; }
  bool fit_row(const TokenRows& tokens, const StoreView& store, int row) override {
    const auto head_dim = static_cast<size_t>(params_.head_dim);
    float* mean = store.table(SIKV_KEY_MEAN, row);
    if (!simd_.means(tokens, head_dim, mean)) return false;
    const auto sums = std::make_unique_for_overwrite<CodebookSums>();
    simd_.fit(tokens, head_dim, mean, sums.get(), store.table(SIKV_CODEBOOK, row));
    return true;
  }
  bool encode_page(const TokenRows& tokens, const StoreView& store, int row, int page,
                   int token) override {
    return simd_.pack_keys(tokens, params_, store.table(SIKV_KEY_MEAN, row),
                           planes(store, row, page), token);
  }
  void decode_page(const StoreView& store, int row, int page, std::span<const int32_t> slots,
                   float* out) const override {
    const rlm4::KeyPage planes = this->planes(store, row, page);
    const float* mean = store.table(SIKV_KEY_MEAN, row);
    for (const int32_t slot : slots) {
      simd_.unpack_key(params_, mean, planes, slot % kPageTokens, out);
      out += params_.head_dim;
    }
  }

 private:
  rlm4::KeyPage planes(const StoreView& store, int row, int page) const {
    return {store.page(SIKV_INDEX_CODE, row, page), store.page(SIKV_MAGNITUDE, row, page),
            store.page(SIKV_SCALE, row, page), line_};
  }

  const RotLmSimd& simd_ = *rot_lm_simd();
  rlm4::Params params_;
  int line_;
  int fit_tokens_;
};

class RotLmValuesCpu final : public SimdCodec {
 public:
  explicit RotLmValuesCpu(const CreateArgs& args)
      : SimdCodec(args, SIKV_VALUE_CODEC, make_rot_lm_values_ref(args)),
        params_(rlm4::read_params(layout_view())),
        line_(rlm4::read_line(layout_view())),
        fit_tokens_(static_cast<int>(args.options.integer("fit_tokens"))) {}

 protected:
  int fit_tokens() const override { return fit_tokens_; }
  bool fit_row(const TokenRows& tokens, const StoreView& store, int row) override {
    return simd_.means(tokens, static_cast<size_t>(params_.head_dim),
                       store.table(SIKV_VALUE_MEAN, row));
  }
  bool encode_page(const TokenRows& tokens, const StoreView& store, int row, int page,
                   int token) override {
    return simd_.pack_values(tokens, params_, store.table(SIKV_VALUE_MEAN, row),
                             planes(store, row, page), token);
  }
  void decode_page(const StoreView& store, int row, int page, std::span<const int32_t> slots,
                   float* out) const override {
    const rlm4::ValuePage planes = this->planes(store, row, page);
    const float* mean = store.table(SIKV_VALUE_MEAN, row);
    for (const int32_t slot : slots) {
      simd_.unpack_value(params_, mean, planes, slot % kPageTokens, out);
      out += params_.head_dim;
    }
  }

 private:
  rlm4::ValuePage planes(const StoreView& store, int row, int page) const {
    return {store.page(SIKV_VALUE_CODE, row, page), store.page(SIKV_VALUE_SCALE, row, page), line_};
  }

  const RotLmSimd& simd_ = *rot_lm_simd();
  rlm4::Params params_;
  int line_;
  int fit_tokens_;
};

}  // namespace

int32_t probe_rot_lm_cpu(const sikv_device*, sikv_message* reason) {
  return probe_simd(rot_lm_simd(), reason);
}

std::unique_ptr<Codec> make_rot_lm_keys_cpu(const CreateArgs& args) {
  return std::make_unique<RotLmKeysCpu>(args);
}
std::unique_ptr<Codec> make_rot_lm_values_cpu(const CreateArgs& args) {
  return std::make_unique<RotLmValuesCpu>(args);
}

}  // namespace sikv

#endif  // HWY_ONCE
