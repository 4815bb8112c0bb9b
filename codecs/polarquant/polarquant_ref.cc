#include "codecs/polarquant/polarquant.h"
#include "plugins/layouts/polar_v1.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {
namespace {

// Keys and values alike, but for the names of family and planes.
struct Side {
  sikv_kind kind;
  const char* family;
  sikv_role code, scale;
};
constexpr Side kKeys = {SIKV_KEY_CODEC, polar::kKeyFamily, SIKV_MAGNITUDE, SIKV_SCALE};
constexpr Side kValues = {SIKV_VALUE_CODEC, polar::kValueFamily, SIKV_VALUE_CODE, SIKV_VALUE_SCALE};

sikv_layout describe(const Side& side, const polar::Params& p) {
  return LayoutBuilder(side.family, polar::kVersion, p.head_dim)
      .param("block", polar::kBlock)
      .plane(side.code, SIKV_PER_TOKEN, 1, polar::code_bytes(p))
      .plane(side.scale, SIKV_PER_TOKEN, 1, polar::scale_bytes(p))
      .build();
}

class Polarquant : public TokenCodec {
 public:
  Polarquant(const CreateArgs& args, const Side& side)
      : TokenCodec(args, side.kind, describe(side, {checked_head_dim(args, "polarquant")})),
        side_(side),
        params_{args.shape.head_dim} {}

 protected:
  void encode_token(const StoreView& store, int row, int page, int token, const float* x) override {
    polar::pack_1(params_, page_of(store, row, page), token, x);
  }
  void decode_token(const StoreView& store, int row, int page, int token, float* x) const override {
    polar::unpack_1(params_, page_of(store, row, page), token, x);
  }

 private:
  polar::Page page_of(const StoreView& store, int row, int page) const {
    return {store.page(side_.code, row, page), store.page(side_.scale, row, page)};
  }

  const Side& side_;
  polar::Params params_;
};

}  // namespace

std::unique_ptr<Codec> make_polarquant_keys_ref(const CreateArgs& args) {
  return std::make_unique<Polarquant>(args, kKeys);
}
std::unique_ptr<Codec> make_polarquant_values_ref(const CreateArgs& args) {
  return std::make_unique<Polarquant>(args, kValues);
}

}  // namespace sikv
