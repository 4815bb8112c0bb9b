#include "codecs/qjl/qjl.h"

#include <algorithm>

#include "kernels/common/sign_sketch.h"
#include "plugins/layouts/minmax.h"
#include "plugins/layouts/qjl_v1.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {
namespace {

sikv_layout describe(const qjl::Params& p, int64_t seed) {
  return LayoutBuilder(qjl::kFamily, qjl::kVersion, p.head_dim)
      .param("rows", p.rows)
      .param("seed", std::to_string(seed))
      .plane(SIKV_MAGNITUDE, SIKV_PER_TOKEN, 1, qjl::sign_bytes(p))
      .plane(SIKV_SCALE, SIKV_PER_TOKEN, 1, qjl::kScaleBytes)
      .build();
}

class Qjl : public TokenCodec {
 public:
  Qjl(const CreateArgs& args, const qjl::Params& params, int64_t seed)
      : TokenCodec(args, SIKV_KEY_CODEC, describe(params, seed)),
        params_(params),
        sketch_(qjl::num_signs(params), params.head_dim, static_cast<uint64_t>(seed)) {}

 protected:
  void encode_token(const StoreView& store, int row, int page, int token, const float* x) override {
    sketch_.sketch(x, signs(store, row, page, token));
    minmax::store_saturated(norm(store, row, page, token), SIKV_FP16, 0,
                            norm_of(x, params_.head_dim));
  }
  void decode_token(const StoreView& store, int row, int page, int token, float* x) const override {
    std::fill_n(x, params_.head_dim, 0.0f);
    sketch_.add_estimate(signs(store, row, page, token),
                         sikv_load(norm(store, row, page, token), SIKV_FP16, 0), x);
  }

 private:
  uint8_t* signs(const StoreView& store, int row, int page, int token) const {
    return store.page(SIKV_MAGNITUDE, row, page) + int64_t{qjl::sign_bytes(params_)} * token;
  }
  uint8_t* norm(const StoreView& store, int row, int page, int token) const {
    return store.page(SIKV_SCALE, row, page) + int64_t{qjl::kScaleBytes} * token;
  }

  qjl::Params params_;
  SignSketch sketch_;
};

}  // namespace

std::unique_ptr<Codec> make_qjl_keys_ref(const CreateArgs& args) {
  return std::make_unique<Qjl>(
      args,
      qjl::Params{checked_head_dim(args, "qjl"), static_cast<int>(args.options.integer("rows"))},
      args.options.integer("seed"));
}

}  // namespace sikv
