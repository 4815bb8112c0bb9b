// intq with SIMD: 2, 4 and 8 bits in blocks of tokens; 16 bits are copies.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "codecs/intq/intq_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "codecs/intq/intq.h"
#include "kernels/common/simd_minmax.h"
#include "kernels/common/simd_rows.h"
#include "kernels/common/simd_tokens.h"

#ifndef SIKV_CODECS_INTQ_INTQ_CPU_CC_
#define SIKV_CODECS_INTQ_INTQ_CPU_CC_

namespace sikv {

// The functions of one target.
struct IntqSimd {
  bool (*all_storable)(const TokenRows& rows, size_t head_dim);
  // Tokens that follow each other, to `codes` and `scales`; false if not all are storable.
  bool (*pack)(const MinMaxFormat& format, const TokenRows& rows, uint8_t* codes, uint8_t* scales);
  // x [D] <- one token.
  void (*unpack)(const MinMaxFormat& format, const uint8_t* codes, const uint8_t* scales, float* x);
  void (*load)(const void* row, int32_t dtype, size_t head_dim, float* x);
};

}  // namespace sikv

#endif  // SIKV_CODECS_INTQ_INTQ_CPU_CC_

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

#if HWY_TARGET != HWY_SCALAR

bool PackRows(const MinMaxFormat& format, const TokenRows& rows, uint8_t* codes, uint8_t* scales) {
  TokenBlock block;
  MinMaxGroups groups;
  bool storable = true;
  for (int t = 0; t < rows.count; t += kBlockTokens) {
    const TokenRows part = rows.part(t, HWY_MIN(kBlockTokens, rows.count - t));
    storable &= AllStorable(part, format.head_dim);
    LoadTokens(part, format.head_dim, kNoMean, block.x);
    PackMinMax(format, block.x, part.count, codes, scales, &groups);
    codes += format.code_bytes() * kBlockTokens;
    scales += format.scale_bytes() * kBlockTokens;
  }
  return storable;
}

#endif

const IntqSimd* TargetIntqSimd() {
#if HWY_TARGET == HWY_SCALAR
  return nullptr;
#else
  static constexpr IntqSimd kSimd = {AllStorable, PackRows, UnpackMinMax, LoadRow};
  return &kSimd;
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include "kernels/common/simd_codec.h"

namespace sikv {

HWY_EXPORT(TargetIntqSimd);

namespace {

const IntqSimd* intq_simd() { return HWY_DYNAMIC_DISPATCH(TargetIntqSimd)(); }

class IntqCpu final : public SimdCodec {
 public:
  explicit IntqCpu(const CreateArgs& args)
      : SimdCodec(args, SIKV_VALUE_CODEC, make_intq_ref(args)),
        params_(intq::read_params(layout_view())),
        format_{head_dim(), params_.bits, static_cast<size_t>(params_.scale_group),
                params_.scale_dtype} {}

 protected:
  bool encodes(const RowsView& rows) const override {
    return params_.bits != 16 || rows.dtype() == params_.value_dtype;
  }

  bool fit_row(const TokenRows& tokens, const StoreView&, int) override {
    return simd_.all_storable(tokens, head_dim());
  }
  bool encode_page(const TokenRows& tokens, const StoreView& store, int row, int page,
                   int token) override {
    uint8_t* codes = store.page(SIKV_VALUE_CODE, row, page);
    if (params_.bits == 16) {
      copy_rows(tokens, intq::code_bytes(params_), token, codes);
      return simd_.all_storable(tokens, head_dim());
    }
    return simd_.pack(
        format_, tokens, codes + int64_t{intq::code_bytes(params_)} * token,
        store.page(SIKV_VALUE_SCALE, row, page) + int64_t{intq::scale_bytes(params_)} * token);
  }
  void decode_page(const StoreView& store, int row, int page, std::span<const int32_t> slots,
                   float* out) const override {
    const uint8_t* codes = store.page(SIKV_VALUE_CODE, row, page);
    const uint8_t* scales =
        intq::has_scale(params_) ? store.page(SIKV_VALUE_SCALE, row, page) : nullptr;
    for (const int32_t slot : slots) {
      const int64_t token = slot % kPageTokens;
      const uint8_t* code = codes + intq::code_bytes(params_) * token;
      if (params_.bits == 16) {
        simd_.load(code, params_.value_dtype, head_dim(), out);
      } else {
        simd_.unpack(format_, code, scales + intq::scale_bytes(params_) * token, out);
      }
      out += head_dim();
    }
  }

 private:
  size_t head_dim() const { return static_cast<size_t>(params_.head_dim); }

  const IntqSimd& simd_ = *intq_simd();
  intq::Params params_;
  MinMaxFormat format_;
};

}  // namespace

int32_t probe_intq_cpu(const sikv_device*, sikv_message* reason) {
  return probe_simd(intq_simd(), reason);
}

std::unique_ptr<Codec> make_intq_cpu(const CreateArgs& args) {
  return std::make_unique<IntqCpu>(args);
}

}  // namespace sikv

#endif  // HWY_ONCE
