// sign_vq with SIMD: mean, alpha and codebook, and every number of magnitude bits, in blocks of
// tokens. Medians are left to the reference.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "codecs/sign_vq/sign_vq_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "codecs/sign_vq/sign_vq.h"
#include "kernels/common/simd_minmax.h"
#include "kernels/common/simd_pack.h"
#include "kernels/common/simd_rows.h"
#include "kernels/common/simd_tokens.h"

#ifndef SIKV_CODECS_SIGN_VQ_SIGN_VQ_CPU_CC_
#define SIKV_CODECS_SIGN_VQ_SIGN_VQ_CPU_CC_

namespace sikv {

// The functions of one target.
struct SignVqSimd {
  bool (*all_storable)(const TokenRows& rows, size_t head_dim);
  bool (*means)(const TokenRows& rows, size_t head_dim, float* mean);
  // alpha [D], codebook [D/4, 16, 4].
  void (*fit)(const TokenRows& rows, size_t head_dim, const float* mean, CodebookSums* sums,
              float* alpha, float* codebook);
  // Signs, and with a format magnitudes, to `token` and those behind it in a page; false if not all
  // are storable.
  bool (*pack)(const TokenRows& rows, size_t head_dim, const sign4::Tables& tables,
               const MinMaxFormat* format, const sign4::Page& page, int token);
  // x [D] <- token `token` of a page, from its magnitudes.
  void (*unpack)(const MinMaxFormat& format, const sign4::Tables& tables, const sign4::Page& page,
                 int token, float* x);
  void (*load)(const void* row, int32_t dtype, size_t head_dim, float* x);
};

}  // namespace sikv

#endif  // SIKV_CODECS_SIGN_VQ_SIGN_VQ_CPU_CC_

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

#if HWY_TARGET != HWY_SCALAR

// alpha [D] <- largest |x| of x [count, D] and alpha.
HWY_INLINE void RaiseAlpha(const float* HWY_RESTRICT x, int count, size_t head_dim,
                           float* HWY_RESTRICT alpha) {
  const DF d;
  for (size_t i = 0; i < head_dim; i += kLanes) {
    VF largest = hn::LoadU(d, alpha + i);
    for (int t = 0; t < count; ++t) {
      largest = hn::Max(largest, hn::Abs(hn::LoadU(d, x + static_cast<size_t>(t) * head_dim + i)));
    }
    hn::StoreU(largest, d, alpha + i);
  }
}

void FitRows(const TokenRows& rows, size_t head_dim, const float* mean, CodebookSums* sums,
             float* alpha, float* codebook) {
  std::fill_n(alpha, head_dim, 0.0f);
  ClearCodebook(head_dim, sums);
  ForEachBlock(
      rows,
      [&](const TokenRows& part) HWY_ATTR {
        float* x = sums->block.x;
        LoadTokens(part, head_dim, mean, x);
        RaiseAlpha(x, part.count, head_dim, alpha);
        AddToCodebook(x, part.count, head_dim, sums);
      },
      [&]() HWY_ATTR { CloseCodebookRun(head_dim, sums); });
  FinishCodebook(*sums, rows.count, head_dim, codebook);
  std::replace(alpha, alpha + head_dim, 0.0f, 1.0f);
}

// x [D] <- min(|x| / alpha, 65504), as sign4::pack_1.
HWY_INLINE void ScaleMagnitudes(size_t head_dim, const float* HWY_RESTRICT alpha,
                                float* HWY_RESTRICT x) {
  const DF d;
  const VF ceiling = hn::Set(d, minmax::largest_finite(SIKV_FP16));
  for (size_t i = 0; i < head_dim; i += kLanes) {
    const VF ratio = hn::Div(hn::Abs(hn::LoadU(d, x + i)), hn::LoadU(d, alpha + i));
    hn::StoreU(hn::Min(ratio, ceiling), d, x + i);
  }
}

bool PackRows(const TokenRows& rows, size_t head_dim, const sign4::Tables& tables,
              const MinMaxFormat* format, const sign4::Page& page, int token) {
  TokenBlock block;
  MinMaxGroups groups;
  ChannelBits signs[kBlockTokens];
  bool storable = true;
  for (int t = 0; t < rows.count; t += kBlockTokens) {
    const TokenRows part = rows.part(t, HWY_MIN(kBlockTokens, rows.count - t));
    storable &= AllStorable(part, head_dim);
    LoadTokens(part, head_dim, tables.mean, block.x);
    for (int i = 0; i < part.count; ++i) {
      float* x = block.x + static_cast<size_t>(i) * head_dim;
      SignBits(x, head_dim, &signs[i]);
      if (format != nullptr) ScaleMagnitudes(head_dim, tables.scale, x);
    }
    StoreSigns(signs, token + t, part.count, head_dim, page.index);
    if (format == nullptr) continue;
    const auto at = static_cast<size_t>(token + t);
    PackMinMax(*format, block.x, part.count, page.magnitude + format->code_bytes() * at,
               page.scale + format->scale_bytes() * at, &groups);
  }
  return storable;
}

void UnpackRow(const MinMaxFormat& format, const sign4::Tables& tables, const sign4::Page& page,
               int token, float* x) {
  const DF d;
  const auto at = static_cast<size_t>(token);
  uint32_t negative[kMaxUnits];
  UnpackMinMax(format, page.magnitude + format.code_bytes() * at,
               page.scale + format.scale_bytes() * at, x);
  UnpackTokenSigns(page.index, token, format.head_dim, negative);
  for (size_t i = 0; i < format.head_dim; i += kLanes) {
    const VF magnitude = hn::Mul(hn::LoadU(d, x + i), hn::LoadU(d, tables.scale + i));
    const VF centred = ApplySigns(magnitude, &negative[i / kUnit], i % kUnit);
    hn::StoreU(hn::Add(centred, hn::LoadU(d, tables.mean + i)), d, x + i);
  }
}

#endif

const SignVqSimd* TargetSignVqSimd() {
#if HWY_TARGET == HWY_SCALAR
  return nullptr;
#else
  static constexpr SignVqSimd kSimd = {AllStorable, ChannelMeans, FitRows,
                                       PackRows,    UnpackRow,    LoadRow};
  return &kSimd;
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include "kernels/common/simd_codec.h"

namespace sikv {

HWY_EXPORT(TargetSignVqSimd);

namespace {

const SignVqSimd* sign_vq_simd() { return HWY_DYNAMIC_DISPATCH(TargetSignVqSimd)(); }

class SignVqCpu final : public SimdCodec {
 public:
  explicit SignVqCpu(const CreateArgs& args)
      : SimdCodec(args, SIKV_KEY_CODEC, make_sign_vq_ref(args)),
        params_(sign4::read_params(layout_view())),
        format_{head_dim(), params_.magnitude_bits, static_cast<size_t>(params_.scale_group),
                params_.scale_dtype},
        center_(args.options.choice("center")),
        fit_tokens_(static_cast<int>(args.options.integer("fit_tokens"))) {}

 protected:
  int fit_tokens() const override { return fit_tokens_; }
  bool fits(const RowsView&) const override { return center_ != "median"; }
  bool encodes(const RowsView& rows) const override {
    return params_.magnitude_bits != 16 || rows.dtype() == params_.key_dtype;
  }
  bool decodes() const override { return params_.magnitude_bits != 0; }

  bool fit_row(const TokenRows& tokens, const StoreView& store, int row) override {
    float* mean = store.table(SIKV_KEY_MEAN, row);
    if (center_ == "none") {
      std::fill_n(mean, head_dim(), 0.0f);
      if (!simd_.all_storable(tokens, head_dim())) return false;
    } else if (!simd_.means(tokens, head_dim(), mean)) {
      return false;
    }
    const auto sums = std::make_unique_for_overwrite<CodebookSums>();
    simd_.fit(tokens, head_dim(), mean, sums.get(), store.table(SIKV_KEY_SCALE, row),
              store.table(SIKV_CODEBOOK, row));
    return true;
  }
  bool encode_page(const TokenRows& tokens, const StoreView& store, int row, int page,
                   int token) override {
    const sign4::Page planes = this->planes(store, row, page);
    if (params_.magnitude_bits == 16) {
      copy_rows(tokens, sign4::magnitude_bytes(params_), token, planes.magnitude);
    }
    return simd_.pack(tokens, head_dim(), tables(store, row),
                      sign4::has_scale(params_) ? &format_ : nullptr, planes, token);
  }
  void decode_page(const StoreView& store, int row, int page, std::span<const int32_t> slots,
                   float* out) const override {
    const sign4::Page planes = this->planes(store, row, page);
    const sign4::Tables tables = this->tables(store, row);
    for (const int32_t slot : slots) {
      const int token = slot % kPageTokens;
      if (params_.magnitude_bits == 16) {
        simd_.load(planes.magnitude + int64_t{sign4::magnitude_bytes(params_)} * token,
                   params_.key_dtype, head_dim(), out);
      } else {
        simd_.unpack(format_, tables, planes, token, out);
      }
      out += head_dim();
    }
  }

 private:
  size_t head_dim() const { return static_cast<size_t>(params_.head_dim); }
  sign4::Page planes(const StoreView& store, int row, int page) const {
    return {store.page(SIKV_INDEX_CODE, row, page),
            sign4::has_magnitude(params_) ? store.page(SIKV_MAGNITUDE, row, page) : nullptr,
            sign4::has_scale(params_) ? store.page(SIKV_SCALE, row, page) : nullptr};
  }
  static sign4::Tables tables(const StoreView& store, int row) {
    return {store.table(SIKV_CODEBOOK, row), store.table(SIKV_KEY_MEAN, row),
            store.table(SIKV_KEY_SCALE, row)};
  }

  const SignVqSimd& simd_ = *sign_vq_simd();
  sign4::Params params_;
  MinMaxFormat format_;
  std::string center_;
  int fit_tokens_;
};

}  // namespace

int32_t probe_sign_vq_cpu(const sikv_device*, sikv_message* reason) {
  return probe_simd(sign_vq_simd(), reason);
}

std::unique_ptr<Codec> make_sign_vq_cpu(const CreateArgs& args) {
  return std::make_unique<SignVqCpu>(args);
}

}  // namespace sikv

#endif  // HWY_ONCE
