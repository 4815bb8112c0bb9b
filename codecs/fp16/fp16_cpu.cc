// fp16 with SIMD: rows are copied as they are; what takes time is to see that they are storable.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "codecs/fp16/fp16_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "codecs/fp16/fp16.h"
#include "kernels/common/simd_rows.h"
#include "kernels/common/simd_tokens.h"

#ifndef SIKV_CODECS_FP16_FP16_CPU_CC_
#define SIKV_CODECS_FP16_FP16_CPU_CC_

namespace sikv {

// The functions of one target.
struct Fp16Simd {
  bool (*all_storable)(const TokenRows& rows, size_t head_dim);
  // x [D] <- a row as it lies in the page.
  void (*load)(const void* row, int32_t dtype, size_t head_dim, float* x);
};

}  // namespace sikv

#endif  // SIKV_CODECS_FP16_FP16_CPU_CC_

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

const Fp16Simd* TargetFp16Simd() {
#if HWY_TARGET == HWY_SCALAR
  return nullptr;
#else
  static constexpr Fp16Simd kSimd = {AllStorable, LoadRow};
  return &kSimd;
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include "kernels/common/simd_codec.h"
#include "plugins/layouts/raw_v1.h"

namespace sikv {

HWY_EXPORT(TargetFp16Simd);

namespace {

const Fp16Simd* fp16_simd() { return HWY_DYNAMIC_DISPATCH(TargetFp16Simd)(); }

class Fp16Cpu final : public SimdCodec {
 public:
  Fp16Cpu(const CreateArgs& args, sikv_kind kind, std::unique_ptr<Codec> ref)
      : SimdCodec(args, kind, std::move(ref)),
        params_(raw::read_params(layout_view())),
        role_(kind == SIKV_KEY_CODEC ? SIKV_MAGNITUDE : SIKV_VALUE_CODE) {}

 protected:
  bool encodes(const RowsView& rows) const override { return rows.dtype() == params_.dtype; }

  bool fit_row(const TokenRows& tokens, const StoreView&, int) override {
    return simd_.all_storable(tokens, head_dim());
  }
  bool encode_page(const TokenRows& tokens, const StoreView& store, int row, int page,
                   int token) override {
    copy_rows(tokens, raw::row_bytes(params_), token, store.page(role_, row, page));
    return simd_.all_storable(tokens, head_dim());
  }
  void decode_page(const StoreView& store, int row, int page, std::span<const int32_t> slots,
                   float* out) const override {
    const uint8_t* plane = store.page(role_, row, page);
    for (const int32_t slot : slots) {
      simd_.load(plane + int64_t{raw::row_bytes(params_)} * (slot % kPageTokens), params_.dtype,
                 head_dim(), out);
      out += head_dim();
    }
  }

 private:
  size_t head_dim() const { return static_cast<size_t>(params_.head_dim); }

  const Fp16Simd& simd_ = *fp16_simd();
  raw::Params params_;
  sikv_role role_;
};

}  // namespace

int32_t probe_fp16_cpu(const sikv_device*, sikv_message* reason) {
  return probe_simd(fp16_simd(), reason);
}

std::unique_ptr<Codec> make_fp16_keys_cpu(const CreateArgs& args) {
  return std::make_unique<Fp16Cpu>(args, SIKV_KEY_CODEC, make_fp16_keys_ref(args));
}
std::unique_ptr<Codec> make_fp16_values_cpu(const CreateArgs& args) {
  return std::make_unique<Fp16Cpu>(args, SIKV_VALUE_CODEC, make_fp16_values_ref(args));
}

}  // namespace sikv

#endif  // HWY_ONCE
