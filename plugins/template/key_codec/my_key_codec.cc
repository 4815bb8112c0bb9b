// my_key_codec: a key is one signed byte per channel and one scale.
//
//   plane MAGNITUDE, a token   | code 0 | code 1 | ... | code D-1 |   D signed bytes
//   plane SCALE, a token       | scale |                              fp32
//
// channel = code * scale, scale = largest |channel| / levels; a key of zeros has scale 0.
#include <cmath>
#include <cstring>

#include "plugins/sdk/row_codec.h"

namespace {

constexpr sikv_option_spec kOptions[] = {
    sikv::int_option("levels", "127", 1, 127, "codes run from -levels to levels"),
};

class MyKeyCodec final : public sikv::TokenCodec {
 public:
  explicit MyKeyCodec(const sikv::CreateArgs& args)
      : TokenCodec(args, SIKV_KEY_CODEC, describe(args.shape.head_dim)),
        head_dim_(args.shape.head_dim),
        levels_(static_cast<float>(args.options.integer("levels"))) {}

 protected:
  void encode_token(const sikv::StoreView& store, int row, int page, int token,
                    const float* x) override {
    float largest = 0.0f;
    for (int d = 0; d < head_dim_; ++d) largest = std::max(largest, std::abs(x[d]));
    const float scale = largest / levels_;
    uint8_t* codes = store.page(SIKV_MAGNITUDE, row, page) + token * head_dim_;
    for (int d = 0; d < head_dim_; ++d) {
      const float code = scale == 0.0f ? 0.0f : std::nearbyint(x[d] / scale);
      codes[d] = static_cast<uint8_t>(static_cast<int8_t>(code));
    }
    std::memcpy(store.page(SIKV_SCALE, row, page) + token * sizeof scale, &scale, sizeof scale);
  }

  void decode_token(const sikv::StoreView& store, int row, int page, int token,
                    float* x) const override {
    float scale;
    std::memcpy(&scale, store.page(SIKV_SCALE, row, page) + token * sizeof scale, sizeof scale);
    const uint8_t* codes = store.page(SIKV_MAGNITUDE, row, page) + token * head_dim_;
    for (int d = 0; d < head_dim_; ++d) x[d] = scale * static_cast<int8_t>(codes[d]);
  }

 private:
  // Everything a reader of the pages must know. Change the bytes, change the version.
  static sikv_layout describe(int head_dim) {
    return sikv::LayoutBuilder("my_key_codec", 1, head_dim)
        .plane(SIKV_MAGNITUDE, SIKV_PER_TOKEN, 1, head_dim)
        .plane(SIKV_SCALE, SIKV_PER_TOKEN, 1, sizeof(float))
        .build();
  }

  int head_dim_;
  float levels_;
};

std::unique_ptr<sikv::Codec> make(const sikv::CreateArgs& args) {
  return std::make_unique<MyKeyCodec>(args);
}

}  // namespace

SIKV_PLUGIN("my_key_codec", "0.1.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_KEY_CODEC),
            sikv::key_codec<make, kOptions>("ref"))
