// Private to codecs/rot_lm.
#ifndef SIKV_CODECS_ROT_LM_ROT_LM_H_
#define SIKV_CODECS_ROT_LM_ROT_LM_H_

#include <memory>

#include "plugins/layouts/rlm4_v1.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {

inline constexpr sikv_option_spec kRotLmKeyOptions[] = {
    int_choice_option("bits", "3", "2|3|4", "bits per channel, the sign included"),
    choice_option(
        "layout", "planes", "planes|lines",
        "lines: a token's key in one piece of memory, 3 bits only; 30 bytes more at D = 128"),
    int_option("fit_tokens", "16384", 0, 1 << 20,
               "tokens of the prompt that the fit reads, evenly spaced; 0: every one"),
};
inline constexpr sikv_option_spec kRotLmValueOptions[] = {
    int_choice_option("bits", "2", "2|3|4", "bits per channel, the sign included"),
    choice_option("layout", "planes", "planes|lines",
                  "lines: a token's scale in the line of its key, which must have one"),
    int_option("fit_tokens", "16384", 0, 1 << 20,
               "tokens of the prompt that the fit reads, evenly spaced; 0: every one"),
};

// The scalar references. A SIMD variant overrides whole rows.
class RotLmKeys : public TokenCodec {
 public:
  explicit RotLmKeys(const CreateArgs& args);

 protected:
  void fit_row(const RowTokens& tokens, const StoreView& store, int row) override;
  void encode_token(const StoreView& store, int row, int page, int token,
                    const float* key) override;
  void decode_token(const StoreView& store, int row, int page, int token,
                    float* key) const override;

  const rlm4::Params& params() const { return params_; }
  rlm4::KeyPage page(const StoreView& store, int row, int page) const;

 private:
  RotLmKeys(const CreateArgs& args, const rlm4::Params& params, int line);

  rlm4::Params params_;
  int line_;  // bytes, 0: planes
  int fit_tokens_;
};

class RotLmValues : public TokenCodec {
 public:
  explicit RotLmValues(const CreateArgs& args);

 protected:
  void fit_row(const RowTokens& tokens, const StoreView& store, int row) override;
  void encode_token(const StoreView& store, int row, int page, int token,
                    const float* value) override;
  void decode_token(const StoreView& store, int row, int page, int token,
                    float* value) const override;

  const rlm4::Params& params() const { return params_; }
  rlm4::ValuePage page(const StoreView& store, int row, int page) const;

 private:
  RotLmValues(const CreateArgs& args, const rlm4::Params& params, int line);

  rlm4::Params params_;
  int line_;  // bytes, 0: planes
  int fit_tokens_;
};

std::unique_ptr<Codec> make_rot_lm_keys_ref(const CreateArgs& args);
std::unique_ptr<Codec> make_rot_lm_values_ref(const CreateArgs& args);

int32_t probe_rot_lm_cpu(const sikv_device* device, sikv_message* reason);
std::unique_ptr<Codec> make_rot_lm_keys_cpu(const CreateArgs& args);
std::unique_ptr<Codec> make_rot_lm_values_cpu(const CreateArgs& args);

}  // namespace sikv

#endif  // SIKV_CODECS_ROT_LM_ROT_LM_H_
