// The four kinds of plugin as the command line names them.
#ifndef SIKV_APPS_COMMON_KINDS_H_
#define SIKV_APPS_COMMON_KINDS_H_

#include <array>
#include <string>

#include "plugins/abi/sikv_abi.h"

namespace sikv {

struct Kind {
  sikv_kind kind;
  const char* name;
};
inline constexpr std::array<Kind, 4> kKinds = {{{SIKV_KEY_CODEC, "key_codec"},
                                                {SIKV_VALUE_CODEC, "value_codec"},
                                                {SIKV_SELECTOR, "selector"},
                                                {SIKV_KERNEL, "kernel"}}};

// "key_codec, value_codec, ..."
std::string kind_names();

// The kind of that name; Error with the nearest one.
sikv_kind parse_kind(const std::string& name);

}  // namespace sikv

#endif  // SIKV_APPS_COMMON_KINDS_H_
