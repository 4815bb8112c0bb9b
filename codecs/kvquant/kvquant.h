// Private to codecs/kvquant.
#ifndef SIKV_CODECS_KVQUANT_KVQUANT_H_
#define SIKV_CODECS_KVQUANT_KVQUANT_H_

#include <memory>

#include "plugins/layouts/kvquant_v1.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {

inline constexpr sikv_option_spec kKvquantOptions[] = {
    int_choice_option("bits", "3", "2|3|4|5", "bits per channel"),
};

class KvquantKeys : public TokenCodec {
 public:
  explicit KvquantKeys(const CreateArgs& args);

 protected:
  void fit_row(const RowTokens& tokens, const StoreView& store, int row) override;
  void encode_token(const StoreView& store, int row, int page, int token,
                    const float* key) override;
  void decode_token(const StoreView& store, int row, int page, int token,
                    float* key) const override;

 private:
  kvquant::Params params_;
};

class KvquantValues : public TokenCodec {
 public:
  explicit KvquantValues(const CreateArgs& args);

 protected:
  void fit_row(const RowTokens& tokens, const StoreView& store, int row) override;
  void encode_token(const StoreView& store, int row, int page, int token,
                    const float* value) override;
  void decode_token(const StoreView& store, int row, int page, int token,
                    float* value) const override;

 private:
  kvquant::Params params_;
};

std::unique_ptr<Codec> make_kvquant_keys_ref(const CreateArgs& args);
std::unique_ptr<Codec> make_kvquant_values_ref(const CreateArgs& args);

}  // namespace sikv

#endif  // SIKV_CODECS_KVQUANT_KVQUANT_H_
