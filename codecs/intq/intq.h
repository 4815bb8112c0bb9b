// Private to codecs/intq.
#ifndef SIKV_CODECS_INTQ_INTQ_H_
#define SIKV_CODECS_INTQ_INTQ_H_

#include <memory>

#include "plugins/layouts/intq_v1.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {

inline constexpr sikv_option_spec kIntqOptions[] = {
    int_choice_option("bits", "2", "2|4|8|16", "bits per channel; 16: values as they came"),
    int_choice_option("scale_group", "32", "16|32|64|128",
                      "channels that share a scale and a zero; must divide D"),
    choice_option("scale_type", "fp16", "fp16|fp8_e4m3|fp8_e5m2", "type of scales and zeros"),
};

// The scalar reference. A SIMD variant overrides whole rows.
class Intq : public TokenCodec {
 public:
  explicit Intq(const CreateArgs& args);

 protected:
  void encode_token(const StoreView& store, int row, int page, int token,
                    const float* value) override;
  void decode_token(const StoreView& store, int row, int page, int token,
                    float* value) const override;

  const intq::Params& params() const { return params_; }
  intq::Page page(const StoreView& store, int row, int page) const;

 private:
  Intq(const CreateArgs& args, const intq::Params& params);

  intq::Params params_;
};

std::unique_ptr<Codec> make_intq_ref(const CreateArgs& args);

int32_t probe_intq_cpu(const sikv_device* device, sikv_message* reason);
std::unique_ptr<Codec> make_intq_cpu(const CreateArgs& args);

}  // namespace sikv

#endif  // SIKV_CODECS_INTQ_INTQ_H_
