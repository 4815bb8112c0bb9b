#include "codecs/intq/intq.h"

namespace sikv {
namespace {

intq::Params read_options(const CreateArgs& args) {
  intq::Params p{checked_head_dim(args, "intq"), static_cast<int>(args.options.integer("bits"))};
  if (intq::has_scale(p)) p.scale_group = checked_channel_group(args, "intq", "scale_group");
  p.scale_dtype = dtype_from_name(args.options.choice("scale_type"));
  p.value_dtype = args.shape.dtype;
  return p;
}

sikv_layout describe(const intq::Params& p) {
  LayoutBuilder layout(intq::kFamily, intq::kVersion, p.head_dim);
  layout.param("bits", p.bits).plane(SIKV_VALUE_CODE, SIKV_PER_TOKEN, 1, intq::code_bytes(p));
  if (intq::has_scale(p)) {
    layout.param("scale_group", p.scale_group)
        .param("scale", dtype_name(p.scale_dtype))
        .plane(SIKV_VALUE_SCALE, SIKV_PER_TOKEN, 1, intq::scale_bytes(p));
  } else {
    layout.param("dtype", dtype_name(p.value_dtype));
  }
  return layout.build();
}

}  // namespace

Intq::Intq(const CreateArgs& args) : Intq(args, read_options(args)) {}

Intq::Intq(const CreateArgs& args, const intq::Params& params)
    : TokenCodec(args, SIKV_VALUE_CODEC, describe(params)), params_(params) {}

intq::Page Intq::page(const StoreView& store, int row, int page) const {
  return {store.page(SIKV_VALUE_CODE, row, page),
          intq::has_scale(params_) ? store.page(SIKV_VALUE_SCALE, row, page) : nullptr};
}

void Intq::encode_token(const StoreView& store, int row, int page_index, int token,
                        const float* value) {
  intq::pack_1(params_, page(store, row, page_index), token, value);
}

void Intq::decode_token(const StoreView& store, int row, int page_index, int token,
                        float* value) const {
  intq::unpack_1(params_, page(store, row, page_index), token, value);
}

std::unique_ptr<Codec> make_intq_ref(const CreateArgs& args) {
  return std::make_unique<Intq>(args);
}

}  // namespace sikv
