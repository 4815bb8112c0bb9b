// my_value_codec: a value is one byte per channel between its smallest and its largest channel.
//
//   plane VALUE_CODE, a token    | code 0 | code 1 | ... | code D-1 |   D bytes
//   plane VALUE_SCALE, a token   | zero | step |                        2 x fp32
//
// channel = zero + code * step, step = (largest - smallest) / levels; equal channels have step 0.
#include <cmath>
#include <cstring>

#include "plugins/sdk/row_codec.h"

namespace {

constexpr sikv_option_spec kOptions[] = {
    sikv::int_option("levels", "255", 1, 255, "codes run from 0 to levels"),
};

struct Scale {
  float zero, step;
};

class MyValueCodec final : public sikv::TokenCodec {
 public:
  explicit MyValueCodec(const sikv::CreateArgs& args)
      : TokenCodec(args, SIKV_VALUE_CODEC, describe(args.shape.head_dim)),
        head_dim_(args.shape.head_dim),
        levels_(static_cast<float>(args.options.integer("levels"))) {}

 protected:
  void encode_token(const sikv::StoreView& store, int row, int page, int token,
                    const float* x) override {
    const auto [smallest, largest] = std::minmax_element(x, x + head_dim_);
    const Scale scale = {*smallest, (*largest - *smallest) / levels_};
    uint8_t* codes = store.page(SIKV_VALUE_CODE, row, page) + token * head_dim_;
    for (int d = 0; d < head_dim_; ++d) {
      const float code = scale.step == 0.0f ? 0.0f : (x[d] - scale.zero) / scale.step;
      codes[d] = static_cast<uint8_t>(std::clamp(std::nearbyint(code), 0.0f, levels_));
    }
    std::memcpy(store.page(SIKV_VALUE_SCALE, row, page) + token * sizeof scale, &scale,
                sizeof scale);
  }

  void decode_token(const sikv::StoreView& store, int row, int page, int token,
                    float* x) const override {
    Scale scale;
    std::memcpy(&scale, store.page(SIKV_VALUE_SCALE, row, page) + token * sizeof scale,
                sizeof scale);
    const uint8_t* codes = store.page(SIKV_VALUE_CODE, row, page) + token * head_dim_;
    for (int d = 0; d < head_dim_; ++d) x[d] = scale.zero + scale.step * codes[d];
  }

 private:
  // Everything a reader of the pages must know. Change the bytes, change the version.
  static sikv_layout describe(int head_dim) {
    return sikv::LayoutBuilder("my_value_codec", 1, head_dim)
        .plane(SIKV_VALUE_CODE, SIKV_PER_TOKEN, 1, head_dim)
        .plane(SIKV_VALUE_SCALE, SIKV_PER_TOKEN, 1, sizeof(Scale))
        .build();
  }

  int head_dim_;
  float levels_;
};

std::unique_ptr<sikv::Codec> make(const sikv::CreateArgs& args) {
  return std::make_unique<MyValueCodec>(args);
}

}  // namespace

SIKV_PLUGIN("my_value_codec", "0.1.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_VALUE_CODEC),
            sikv::value_codec<make, kOptions>("ref"))
