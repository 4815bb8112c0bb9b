#include "codecs/turboquant/turboquant.h"

namespace sikv {
namespace {

turbo::Params read_options(const CreateArgs& args, bool prod) {
  const turbo::Params p{checked_head_dim(args, "turboquant"),
                        static_cast<int>(args.options.integer("bits")), prod};
  if (p.prod && p.bits == 1) {
    throw Refused(
        "turboquant keys of 1 bit have no layout with form: prod, whose sketch takes one bit and "
        "leaves none for the levels: use 2 bits or more");
  }
  return p;
}

sikv_layout describe(sikv_kind kind, const turbo::Params& p, int seed) {
  const bool keys = kind == SIKV_KEY_CODEC;
  LayoutBuilder layout(keys ? turbo::kKeyFamily : turbo::kValueFamily, turbo::kVersion, p.head_dim);
  if (keys) layout.param("form", p.prod ? "prod" : "mse");
  layout.param("bits", p.bits);
  if (p.prod) layout.param("seed", seed);
  return layout
      .plane(keys ? SIKV_MAGNITUDE : SIKV_VALUE_CODE, SIKV_PER_TOKEN, 1, turbo::code_bytes(p))
      .plane(keys ? SIKV_SCALE : SIKV_VALUE_SCALE, SIKV_PER_TOKEN, 1, turbo::scale_bytes(p))
      .build();
}

}  // namespace

Turboquant::Turboquant(const CreateArgs& args, sikv_kind kind, const turbo::Params& params,
                       int seed)
    : TokenCodec(args, kind, describe(kind, params, seed)),
      params_(params),
      code_(kind == SIKV_KEY_CODEC ? SIKV_MAGNITUDE : SIKV_VALUE_CODE),
      scale_(kind == SIKV_KEY_CODEC ? SIKV_SCALE : SIKV_VALUE_SCALE),
      sketch_(params.prod ? params.head_dim : 0, params.head_dim, static_cast<uint64_t>(seed)) {}

turbo::Page Turboquant::page(const StoreView& store, int row, int page) const {
  return {store.page(code_, row, page), store.page(scale_, row, page)};
}

void Turboquant::encode_token(const StoreView& store, int row, int page_index, int token,
                              const float* x) {
  const turbo::Page to = page(store, row, page_index);
  float residual[kMaxHeadDim];
  turbo::pack_1(params_, to, token, x, residual);
  if (!params_.prod) return;
  sketch_.sketch(residual, turbo::sketch_row(params_, to, token));
  turbo::store_residual(params_, to, token, residual);
}

void Turboquant::decode_token(const StoreView& store, int row, int page_index, int token,
                              float* x) const {
  const turbo::Page from = page(store, row, page_index);
  turbo::unpack_rotated_1(params_, from, token, x);
  if (params_.prod) {
    sketch_.add_estimate(turbo::sketch_row(params_, from, token),
                         turbo::load_residual(params_, from, token), x);
  }
  rotation::inverse(x, params_.head_dim);
}

std::unique_ptr<Codec> make_turboquant_keys_ref(const CreateArgs& args) {
  return std::make_unique<Turboquant>(args, SIKV_KEY_CODEC,
                                      read_options(args, args.options.choice("form") == "prod"),
                                      static_cast<int>(args.options.integer("seed")));
}
std::unique_ptr<Codec> make_turboquant_values_ref(const CreateArgs& args) {
  return std::make_unique<Turboquant>(args, SIKV_VALUE_CODEC, read_options(args, false), 0);
}

}  // namespace sikv
