#include <string>

#include "codecs/rot_lm/rot_lm.h"
#include "plugins/layouts/paged_sum.h"

namespace sikv {
namespace {

rlm4::Params read_options(const CreateArgs& args) {
  return {checked_head_dim(args, "rot_lm"), static_cast<int>(args.options.integer("bits"))};
}

// Bytes of a line, 0 for planes.
int read_line(const CreateArgs& args, const rlm4::Params& p) {
  return args.options.choice("layout") == "lines" ? rlm4::line_bytes(p.head_dim) : 0;
}

sikv_layout describe_keys(const rlm4::Params& p, int line) {
  if (line > 0 && p.bits != rlm4::kLineKeyBits) {
    throw Refused("rot_lm keys of " + std::to_string(p.bits) +
                  " bits have no layout: lines, only those of 3 bits do: use layout: planes");
  }
  LayoutBuilder layout(line > 0 ? rlm4::kKeyLineFamily : rlm4::kKeyFamily, rlm4::kVersion,
                       p.head_dim);
  layout.param("bits", p.bits)
      .plane(SIKV_INDEX_CODE, SIKV_NIBBLE_TILES, nibble_tile::kTileTokens,
             rlm4::index_tile_bytes(p));
  if (line > 0) {
    layout.in_line(SIKV_MAGNITUDE, line, 0, rlm4::line_key_scale(p.head_dim))
        .in_line(SIKV_SCALE, line, rlm4::line_key_scale(p.head_dim), rlm4::kScaleBytes);
  } else {
    layout.plane(SIKV_MAGNITUDE, SIKV_PER_TOKEN, 1, rlm4::magnitude_bytes(p))
        .plane(SIKV_SCALE, SIKV_PER_TOKEN, 1, rlm4::kScaleBytes);
  }
  return layout.table(SIKV_CODEBOOK, nibble_tile::codebook_floats(p.head_dim))
      .table(SIKV_KEY_MEAN, p.head_dim)
      .build();
}

sikv_layout describe_values(const rlm4::Params& p, int line) {
  LayoutBuilder layout(line > 0 ? rlm4::kValueLineFamily : rlm4::kValueFamily, rlm4::kVersion,
                       p.head_dim);
  layout.param("bits", p.bits).plane(SIKV_VALUE_CODE, SIKV_PER_TOKEN, 1, rlm4::value_code_bytes(p));
  if (line > 0) {
    layout.in_line(SIKV_VALUE_SCALE, line, rlm4::line_value_scale(p.head_dim), rlm4::kScaleBytes);
  } else {
    layout.plane(SIKV_VALUE_SCALE, SIKV_PER_TOKEN, 1, rlm4::kScaleBytes);
  }
  return layout.table(SIKV_VALUE_MEAN, p.head_dim).build();
}

}  // namespace

// ---- keys ---------------------------------------------------------------------------------------

RotLmKeys::RotLmKeys(const CreateArgs& args)
    : RotLmKeys(args, read_options(args), read_line(args, read_options(args))) {}

RotLmKeys::RotLmKeys(const CreateArgs& args, const rlm4::Params& params, int line)
    : TokenCodec(args, SIKV_KEY_CODEC, describe_keys(params, line)),
      params_(params),
      line_(line),
      fit_tokens_(static_cast<int>(args.options.integer("fit_tokens"))) {}

rlm4::KeyPage RotLmKeys::page(const StoreView& store, int row, int page) const {
  return {store.page(SIKV_INDEX_CODE, row, page), store.page(SIKV_MAGNITUDE, row, page),
          store.page(SIKV_SCALE, row, page), line_};
}

void RotLmKeys::fit_row(const RowTokens& tokens, const StoreView& store, int row) {
  float* mean = store.table(SIKV_KEY_MEAN, row);
  const SampledTokens sample(tokens, fit_tokens_);
  channel_means(sample, mean);
  SignCodebookFit codebook(params_.head_dim);
  float rotated[kMaxHeadDim];
  sample.for_each([&](int, const float* key) {
    rlm4::rotate_centred(params_, key, mean, rotated);
    codebook.add(rotated);
  });
  codebook.finish(store.table(SIKV_CODEBOOK, row));
  if (!sample.all()) tokens.check_newest();
}

void RotLmKeys::encode_token(const StoreView& store, int row, int page_index, int token,
                             const float* key) {
  rlm4::pack_1(params_, page(store, row, page_index), token, store.table(SIKV_KEY_MEAN, row), key);
}

void RotLmKeys::decode_token(const StoreView& store, int row, int page_index, int token,
                             float* key) const {
  rlm4::unpack_1(params_, page(store, row, page_index), token, store.table(SIKV_KEY_MEAN, row),
                 key);
}

// ---- values -------------------------------------------------------------------------------------

RotLmValues::RotLmValues(const CreateArgs& args)
    : RotLmValues(args, read_options(args), read_line(args, read_options(args))) {}

RotLmValues::RotLmValues(const CreateArgs& args, const rlm4::Params& params, int line)
    : TokenCodec(args, SIKV_VALUE_CODEC, describe_values(params, line)),
      params_(params),
      line_(line),
      fit_tokens_(static_cast<int>(args.options.integer("fit_tokens"))) {}

rlm4::ValuePage RotLmValues::page(const StoreView& store, int row, int page) const {
  return {store.page(SIKV_VALUE_CODE, row, page), store.page(SIKV_VALUE_SCALE, row, page), line_};
}

void RotLmValues::fit_row(const RowTokens& tokens, const StoreView& store, int row) {
  const SampledTokens sample(tokens, fit_tokens_);
  channel_means(sample, store.table(SIKV_VALUE_MEAN, row));
  if (!sample.all()) tokens.check_newest();
}

void RotLmValues::encode_token(const StoreView& store, int row, int page_index, int token,
                               const float* value) {
  rlm4::pack_1(params_, page(store, row, page_index), token, store.table(SIKV_VALUE_MEAN, row),
               value);
}

void RotLmValues::decode_token(const StoreView& store, int row, int page_index, int token,
                               float* value) const {
  rlm4::unpack_1(params_, page(store, row, page_index), token, store.table(SIKV_VALUE_MEAN, row),
                 value);
}

std::unique_ptr<Codec> make_rot_lm_keys_ref(const CreateArgs& args) {
  return std::make_unique<RotLmKeys>(args);
}
std::unique_ptr<Codec> make_rot_lm_values_ref(const CreateArgs& args) {
  return std::make_unique<RotLmValues>(args);
}

}  // namespace sikv
