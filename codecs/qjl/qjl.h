// Private to codecs/qjl.
#ifndef SIKV_CODECS_QJL_QJL_H_
#define SIKV_CODECS_QJL_QJL_H_

#include <memory>

#include "plugins/sdk/plugin.h"

namespace sikv {

inline constexpr sikv_option_spec kQjlOptions[] = {
    int_choice_option("rows", "2", "2|3|4", "signs per channel"),
    int_option("seed", "0", 0, 1e9, "of the projection"),
};

std::unique_ptr<Codec> make_qjl_keys_ref(const CreateArgs& args);

}  // namespace sikv

#endif  // SIKV_CODECS_QJL_QJL_H_
