// Private to codecs/kivi.
#ifndef SIKV_CODECS_KIVI_KIVI_H_
#define SIKV_CODECS_KIVI_KIVI_H_

#include <memory>

#include "plugins/layouts/intq_v1.h"
#include "plugins/layouts/kivi_v1.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {

inline constexpr sikv_option_spec kKiviKeyOptions[] = {
    int_choice_option("bits", "2", "2|4", "bits per channel"),
    int_choice_option("group", "32", "32|64|128", "tokens that share a channel's scale and zero"),
};
inline constexpr sikv_option_spec kKiviValueOptions[] = {
    int_choice_option("bits", "2", "2|4", "bits per channel"),
    int_choice_option("group", "32", "32|64|128", "channels that share a token's scale and zero"),
};

// The scalar references. A SIMD variant overrides whole rows.
class KiviKeys : public RowCodec {
 public:
  explicit KiviKeys(const CreateArgs& args);

 protected:
  void encode_row(const RowTokens& tokens, const StoreView& store, int row) override;
  void decode_row(const StoreView& store, int row, std::span<const int32_t> slots,
                  float* out) const override;

  const kivi::Params& params() const { return params_; }
  static kivi::Page page(const StoreView& store, int row, int page);

 private:
  KiviKeys(const CreateArgs& args, const kivi::Params& params);

  kivi::Params params_;
};

class KiviValues : public TokenCodec {
 public:
  explicit KiviValues(const CreateArgs& args);

 protected:
  void encode_token(const StoreView& store, int row, int page, int token,
                    const float* value) override;
  void decode_token(const StoreView& store, int row, int page, int token,
                    float* value) const override;

  const intq::Params& params() const { return params_; }
  static intq::Page page(const StoreView& store, int row, int page);

 private:
  KiviValues(const CreateArgs& args, const intq::Params& params);

  intq::Params params_;
};

std::unique_ptr<Codec> make_kivi_keys_ref(const CreateArgs& args);
std::unique_ptr<Codec> make_kivi_values_ref(const CreateArgs& args);

}  // namespace sikv

#endif  // SIKV_CODECS_KIVI_KIVI_H_
