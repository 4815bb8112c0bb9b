#include "codecs/fp16/fp16.h"
#include "plugins/layouts/raw_v1.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {
namespace {

class Fp16Ref final : public TokenCodec {
 public:
  Fp16Ref(const CreateArgs& args, sikv_kind kind)
      : Fp16Ref(args, kind, raw::Params{checked_head_dim(args, "fp16"), args.shape.dtype}) {}

 protected:
  void encode_token(const StoreView& store, int row, int page, int token, const float* x) override {
    raw::pack_1(params_, store.page(role_, row, page), token, x);
  }
  void decode_token(const StoreView& store, int row, int page, int token, float* x) const override {
    raw::unpack_1(params_, store.page(role_, row, page), token, x);
  }

 private:
  Fp16Ref(const CreateArgs& args, sikv_kind kind, const raw::Params& params)
      : TokenCodec(args, kind, describe(kind, params)), params_(params), role_(role_of(kind)) {}

  static sikv_role role_of(sikv_kind kind) {
    return kind == SIKV_KEY_CODEC ? SIKV_MAGNITUDE : SIKV_VALUE_CODE;
  }
  static sikv_layout describe(sikv_kind kind, const raw::Params& params) {
    return LayoutBuilder(raw::kFamily, raw::kVersion, params.head_dim)
        .param("dtype", dtype_name(params.dtype))
        .plane(role_of(kind), SIKV_PER_TOKEN, 1, raw::row_bytes(params))
        .build();
  }

  raw::Params params_;
  sikv_role role_;
};

}  // namespace

std::unique_ptr<Codec> make_fp16_keys_ref(const CreateArgs& args) {
  return std::make_unique<Fp16Ref>(args, SIKV_KEY_CODEC);
}
std::unique_ptr<Codec> make_fp16_values_ref(const CreateArgs& args) {
  return std::make_unique<Fp16Ref>(args, SIKV_VALUE_CODEC);
}

}  // namespace sikv
