// Private to codecs/sign_vq.
#ifndef SIKV_CODECS_SIGN_VQ_SIGN_VQ_H_
#define SIKV_CODECS_SIGN_VQ_SIGN_VQ_H_

#include <memory>

#include "plugins/layouts/sign4_v1.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {

inline constexpr sikv_option_spec kSignVqOptions[] = {
    int_choice_option("magnitude_bits", "2", "0|2|3|4|8|16",
                      "bits per channel besides the sign; 0: codebook only, 16: keys as they came"),
    int_choice_option("scale_group", "32", "16|32|64|128",
                      "channels that share a scale and a zero; must divide D"),
    choice_option("scale_type", "fp16", "fp16|fp8_e4m3|fp8_e5m2", "type of scales and zeros"),
    choice_option("center", "mean", "mean|median|none",
                  "what is subtracted from the keys, per channel over the prompt"),
    int_option("fit_tokens", "16384", 0, 1 << 20,
               "tokens of the prompt that the fit reads, evenly spaced; 0: every one"),
};

enum class Center { kMean, kMedian, kNone };

// The scalar reference. A SIMD variant overrides whole rows.
class SignVq : public TokenCodec {
 public:
  explicit SignVq(const CreateArgs& args);

 protected:
  void fit_row(const RowTokens& tokens, const StoreView& store, int row) override;
  void encode_token(const StoreView& store, int row, int page, int token,
                    const float* key) override;
  void decode_token(const StoreView& store, int row, int page, int token,
                    float* key) const override;

  const sign4::Params& params() const { return params_; }
  sign4::Page page(const StoreView& store, int row, int page) const;
  static sign4::Tables tables(const StoreView& store, int row);

 private:
  SignVq(const CreateArgs& args, const sign4::Params& params);

  sign4::Params params_;
  Center center_;
  int fit_tokens_;
};

std::unique_ptr<Codec> make_sign_vq_ref(const CreateArgs& args);

int32_t probe_sign_vq_cpu(const sikv_device* device, sikv_message* reason);
std::unique_ptr<Codec> make_sign_vq_cpu(const CreateArgs& args);

}  // namespace sikv

#endif  // SIKV_CODECS_SIGN_VQ_SIGN_VQ_H_
