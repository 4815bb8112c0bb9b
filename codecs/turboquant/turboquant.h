// Private to codecs/turboquant.
#ifndef SIKV_CODECS_TURBOQUANT_TURBOQUANT_H_
#define SIKV_CODECS_TURBOQUANT_TURBOQUANT_H_

#include <memory>

#include "kernels/common/sign_sketch.h"
#include "plugins/layouts/turbo_v1.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {

inline constexpr sikv_option_spec kTurboquantKeyOptions[] = {
    int_choice_option("bits", "3", "1|2|3|4", "bits per channel, the sign included"),
    choice_option("form", "mse", "mse|prod",
                  "prod: one of the bits goes to a sketch that makes inner products unbiased"),
    int_option("seed", "0", 0, 1e9, "of the projection behind form: prod"),
};
inline constexpr sikv_option_spec kTurboquantValueOptions[] = {
    int_choice_option("bits", "2", "1|2|3|4", "bits per channel, the sign included"),
};

class Turboquant : public TokenCodec {
 public:
  Turboquant(const CreateArgs& args, sikv_kind kind, const turbo::Params& params, int seed);

 protected:
  void encode_token(const StoreView& store, int row, int page, int token, const float* x) override;
  void decode_token(const StoreView& store, int row, int page, int token, float* x) const override;

 private:
  turbo::Page page(const StoreView& store, int row, int page) const;

  turbo::Params params_;
  sikv_role code_, scale_;
  SignSketch sketch_;
};

std::unique_ptr<Codec> make_turboquant_keys_ref(const CreateArgs& args);
std::unique_ptr<Codec> make_turboquant_values_ref(const CreateArgs& args);

}  // namespace sikv

#endif  // SIKV_CODECS_TURBOQUANT_TURBOQUANT_H_
