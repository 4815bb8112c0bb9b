#include "codecs/kivi/kivi.h"

namespace sikv {
namespace {

kivi::Params read_key_options(const CreateArgs& args) {
  return {checked_head_dim(args, "kivi"), static_cast<int>(args.options.integer("bits")),
          static_cast<int>(args.options.integer("group"))};
}

intq::Params read_value_options(const CreateArgs& args) {
  return {checked_head_dim(args, "kivi"), static_cast<int>(args.options.integer("bits")),
          checked_channel_group(args, "kivi", "group")};
}

sikv_layout describe_keys(const kivi::Params& p) {
  return LayoutBuilder(kivi::kFamily, kivi::kVersion, p.head_dim)
      .param("bits", p.bits)
      .param("group", p.group)
      .plane(SIKV_MAGNITUDE, SIKV_PER_TOKEN, 1, kivi::magnitude_bytes(p))
      .plane(SIKV_SCALE, SIKV_SHARED, p.group, kivi::scale_tile_bytes(p))
      .build();
}

sikv_layout describe_values(const intq::Params& p) {
  return LayoutBuilder(intq::kKiviFamily, intq::kVersion, p.head_dim)
      .param("bits", p.bits)
      .param("scale_group", p.scale_group)
      .param("scale", dtype_name(p.scale_dtype))
      .plane(SIKV_VALUE_CODE, SIKV_PER_TOKEN, 1, intq::code_bytes(p))
      .plane(SIKV_VALUE_SCALE, SIKV_PER_TOKEN, 1, intq::scale_bytes(p))
      .build();
}

}  // namespace

// ---- keys ---------------------------------------------------------------------------------------

KiviKeys::KiviKeys(const CreateArgs& args) : KiviKeys(args, read_key_options(args)) {}

KiviKeys::KiviKeys(const CreateArgs& args, const kivi::Params& params)
    : RowCodec(args, SIKV_KEY_CODEC, describe_keys(params)), params_(params) {}

kivi::Page KiviKeys::page(const StoreView& store, int row, int page) {
  return {store.page(SIKV_MAGNITUDE, row, page), store.page(SIKV_SCALE, row, page)};
}

void KiviKeys::encode_row(const RowTokens& tokens, const StoreView& store, int row) {
  if (tokens.first_slot() % params_.group != 0) {
    throw PluginBug("kivi keys are encoded from slot " + std::to_string(tokens.first_slot()) +
                    ", which is not the start of a group of tokens");
  }
  const int head_dim = params_.head_dim;
  std::vector<float> keys(static_cast<size_t>(params_.group) * head_dim);
  for (int first = 0; first < tokens.count(); first += params_.group) {
    const int count = std::min(params_.group, tokens.count() - first);
    for (int t = 0; t < count; ++t)
      tokens.load(first + t, &keys[static_cast<size_t>(t) * head_dim]);
    const int slot = tokens.first_slot() + first;
    kivi::pack_group(params_, page(store, row, slot / kPageTokens), slot % kPageTokens, count,
                     keys.data());
  }
}

void KiviKeys::decode_row(const StoreView& store, int row, std::span<const int32_t> slots,
                          float* out) const {
  for (const int32_t slot : slots) {
    kivi::unpack_1(params_, page(store, row, slot / kPageTokens), slot % kPageTokens, out);
    out += params_.head_dim;
  }
}

// ---- values -------------------------------------------------------------------------------------

KiviValues::KiviValues(const CreateArgs& args) : KiviValues(args, read_value_options(args)) {}

KiviValues::KiviValues(const CreateArgs& args, const intq::Params& params)
    : TokenCodec(args, SIKV_VALUE_CODEC, describe_values(params)), params_(params) {}

intq::Page KiviValues::page(const StoreView& store, int row, int page) {
  return {store.page(SIKV_VALUE_CODE, row, page), store.page(SIKV_VALUE_SCALE, row, page)};
}

void KiviValues::encode_token(const StoreView& store, int row, int page_index, int token,
                              const float* value) {
  intq::pack_1(params_, page(store, row, page_index), token, value);
}

void KiviValues::decode_token(const StoreView& store, int row, int page_index, int token,
                              float* value) const {
  intq::unpack_1(params_, page(store, row, page_index), token, value);
}

std::unique_ptr<Codec> make_kivi_keys_ref(const CreateArgs& args) {
  return std::make_unique<KiviKeys>(args);
}
std::unique_ptr<Codec> make_kivi_values_ref(const CreateArgs& args) {
  return std::make_unique<KiviValues>(args);
}

}  // namespace sikv
