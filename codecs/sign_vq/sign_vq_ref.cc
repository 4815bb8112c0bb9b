#include <algorithm>

#include "codecs/sign_vq/sign_vq.h"
#include "plugins/layouts/paged_sum.h"

namespace sikv {
namespace {

sign4::Params read_options(const CreateArgs& args) {
  sign4::Params p{checked_head_dim(args, "sign_vq"),
                  static_cast<int>(args.options.integer("magnitude_bits"))};
  if (sign4::has_scale(p)) p.scale_group = checked_channel_group(args, "sign_vq", "scale_group");
  p.scale_dtype = dtype_from_name(args.options.choice("scale_type"));
  p.key_dtype = args.shape.dtype;
  return p;
}

sikv_layout describe(const sign4::Params& p) {
  LayoutBuilder layout(sign4::kFamily, sign4::kVersion, p.head_dim);
  layout.param("magnitude_bits", p.magnitude_bits)
      .plane(SIKV_INDEX_CODE, SIKV_NIBBLE_TILES, nibble_tile::kTileTokens,
             sign4::index_tile_bytes(p))
      .table(SIKV_CODEBOOK, nibble_tile::codebook_floats(p.head_dim))
      .table(SIKV_KEY_MEAN, p.head_dim)
      .table(SIKV_KEY_SCALE, p.head_dim);
  if (sign4::has_magnitude(p)) {
    layout.plane(SIKV_MAGNITUDE, SIKV_PER_TOKEN, 1, sign4::magnitude_bytes(p));
  }
  if (sign4::has_scale(p)) {
    layout.param("scale_group", p.scale_group)
        .param("scale", dtype_name(p.scale_dtype))
        .plane(SIKV_SCALE, SIKV_PER_TOKEN, 1, sign4::scale_bytes(p));
  }
  if (p.magnitude_bits == 16) layout.param("dtype", dtype_name(p.key_dtype));
  return layout.build();
}

Center read_center(const CreateArgs& args) {
  const std::string_view name = args.options.choice("center");
  return name == "mean" ? Center::kMean : name == "median" ? Center::kMedian : Center::kNone;
}

// median [D] over the tokens, the lower of the middle two for an even count. Holds the row in fp32
// while it lasts: 64 MB at 128K tokens and D = 128.
void channel_medians(const SampledTokens<RowTokens>& tokens, float* median) {
  const size_t count = static_cast<size_t>(tokens.count());
  std::vector<float> columns(count * static_cast<size_t>(tokens.head_dim()));
  tokens.for_each([&](int t, const float* key) {
    for (int d = 0; d < tokens.head_dim(); ++d) columns[count * d + t] = key[d];
  });
  for (int d = 0; d < tokens.head_dim(); ++d) {
    const auto column = columns.begin() + static_cast<ptrdiff_t>(count * d);
    const auto middle = column + static_cast<ptrdiff_t>((count - 1) / 2);
    std::nth_element(column, middle, column + static_cast<ptrdiff_t>(count));
    median[d] = add_rn(*middle, 0.0f);  // of equal zeros either may be in the middle: +0
  }
}

}  // namespace

SignVq::SignVq(const CreateArgs& args) : SignVq(args, read_options(args)) {}

SignVq::SignVq(const CreateArgs& args, const sign4::Params& params)
    : TokenCodec(args, SIKV_KEY_CODEC, describe(params)),
      params_(params),
      center_(read_center(args)),
      fit_tokens_(static_cast<int>(args.options.integer("fit_tokens"))) {}

sign4::Page SignVq::page(const StoreView& store, int row, int page) const {
  return {store.page(SIKV_INDEX_CODE, row, page),
          sign4::has_magnitude(params_) ? store.page(SIKV_MAGNITUDE, row, page) : nullptr,
          sign4::has_scale(params_) ? store.page(SIKV_SCALE, row, page) : nullptr};
}

sign4::Tables SignVq::tables(const StoreView& store, int row) {
  return {store.table(SIKV_CODEBOOK, row), store.table(SIKV_KEY_MEAN, row),
          store.table(SIKV_KEY_SCALE, row)};
}

void SignVq::fit_row(const RowTokens& tokens, const StoreView& store, int row) {
  const int head_dim = params_.head_dim;
  float* mean = store.table(SIKV_KEY_MEAN, row);
  const SampledTokens sample(tokens, fit_tokens_);
  switch (center_) {
    case Center::kMean:
      channel_means(sample, mean);
      break;
    case Center::kMedian:
      channel_medians(sample, mean);
      break;
    case Center::kNone:
      std::fill_n(mean, head_dim, 0.0f);
      break;
  }

  float* alpha = store.table(SIKV_KEY_SCALE, row);
  std::fill_n(alpha, head_dim, 0.0f);
  SignCodebookFit codebook(head_dim);
  float centred[kMaxHeadDim];
  sample.for_each([&](int, const float* key) {
    for (int d = 0; d < head_dim; ++d) {
      centred[d] = key[d] - mean[d];
      alpha[d] = std::max(alpha[d], std::fabs(centred[d]));
    }
    codebook.add(centred);
  });
  codebook.finish(store.table(SIKV_CODEBOOK, row));
  std::replace(alpha, alpha + head_dim, 0.0f, 1.0f);
  if (!sample.all()) tokens.check_newest();
}

void SignVq::encode_token(const StoreView& store, int row, int page_index, int token,
                          const float* key) {
  sign4::pack_1(params_, page(store, row, page_index), token, tables(store, row), key);
}

void SignVq::decode_token(const StoreView& store, int row, int page_index, int token,
                          float* key) const {
  sign4::unpack_1(params_, page(store, row, page_index), token, tables(store, row), key);
}

std::unique_ptr<Codec> make_sign_vq_ref(const CreateArgs& args) {
  return std::make_unique<SignVq>(args);
}

}  // namespace sikv
