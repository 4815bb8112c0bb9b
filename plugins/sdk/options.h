// The options a plugin instance was created with: complete, typed, already checked by the host
// against the plugin's own list.
#ifndef SIKV_PLUGINS_SDK_OPTIONS_H_
#define SIKV_PLUGINS_SDK_OPTIONS_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "plugins/abi/sikv_abi.h"
#include "plugins/sdk/error.h"

namespace sikv {

// A count of tokens, or a fraction of a sequence's current length.
struct Budget {
  int64_t count = -1;
  double fraction = 0.0;

  // Tokens for a sequence of `length` tokens: the count, or floor(fraction * length).
  int64_t tokens(int64_t length) const {
    return count >= 0 ? count : static_cast<int64_t>(fraction * static_cast<double>(length));
  }
};

class Options {
 public:
  explicit Options(const sikv_create_args& args) : values_(args.options, args.num_options) {}

  int64_t integer(std::string_view name) const { return find(name, SIKV_OPTION_INT).i; }
  double number(std::string_view name) const { return find(name, SIKV_OPTION_FLOAT).f; }
  bool flag(std::string_view name) const { return find(name, SIKV_OPTION_BOOL).i != 0; }
  std::string_view choice(std::string_view name) const {
    return find(name, SIKV_OPTION_CHOICE).text;
  }
  std::string_view text(std::string_view name) const { return find(name, SIKV_OPTION_TEXT).text; }
  // The id of what a wrapper wraps.
  std::string_view base() const { return find("base", SIKV_OPTION_SELECTOR).text; }
  Budget budget(std::string_view name) const {
    const sikv_option_value& value = find(name, SIKV_OPTION_BUDGET);
    return {value.i, value.f};
  }

 private:
  const sikv_option_value& find(std::string_view name, uint32_t type) const {
    for (const sikv_option_value& value : values_) {
      if (name == value.name && value.type == type) return value;
    }
    throw PluginBug("the plugin asks for option '" + std::string(name) +
                    "', which is not in its own list with that type");
  }

  std::span<const sikv_option_value> values_;
};

// One line per option in a plugin's list.
constexpr sikv_option_spec int_option(const char* name, const char* default_value, double min,
                                      double max, const char* help) {
  return {name, SIKV_OPTION_INT, 0, min, max, nullptr, default_value, help};
}
// An integer that takes one of a few values, such as "2|4|8|16".
constexpr sikv_option_spec int_choice_option(const char* name, const char* default_value,
                                             const char* choices, const char* help) {
  return {name, SIKV_OPTION_INT, 0, 0, 0, choices, default_value, help};
}
constexpr sikv_option_spec float_option(const char* name, const char* default_value, double min,
                                        double max, const char* help) {
  return {name, SIKV_OPTION_FLOAT, 0, min, max, nullptr, default_value, help};
}
constexpr sikv_option_spec bool_option(const char* name, const char* default_value,
                                       const char* help) {
  return {name, SIKV_OPTION_BOOL, 0, 0, 1, nullptr, default_value, help};
}
constexpr sikv_option_spec choice_option(const char* name, const char* default_value,
                                         const char* choices, const char* help) {
  return {name, SIKV_OPTION_CHOICE, 0, 0, 0, choices, default_value, help};
}
constexpr sikv_option_spec budget_option(const char* name, const char* default_value,
                                         const char* help) {
  return {name, SIKV_OPTION_BUDGET, 0, 0, 0, nullptr, default_value, help};
}
// Free text, such as a path.
constexpr sikv_option_spec text_option(const char* name, const char* default_value,
                                       const char* help) {
  return {name, SIKV_OPTION_TEXT, 0, 0, 0, nullptr, default_value, help};
}
// The selector that a wrapper wraps, CreateArgs::base. Its name is always `base`; it has no default.
constexpr sikv_option_spec selector_option(const char* help) {
  return {"base", SIKV_OPTION_SELECTOR, 0, 0, 0, nullptr, "", help};
}

// Of selectors that fit on the prompt.
inline constexpr sikv_option_spec kFitTokensOption =
    int_option("fit_tokens", "0", 0, 1 << 30,
               "fit on the first so many tokens of the prompt; 0: on all of it");

// Two lists in one, for options that several plugins share.
template <size_t N, size_t M>
constexpr std::array<sikv_option_spec, N + M> join_options(
    const std::array<sikv_option_spec, N>& first, const std::array<sikv_option_spec, M>& second) {
  std::array<sikv_option_spec, N + M> all{};
  std::copy(first.begin(), first.end(), all.begin());
  std::copy(second.begin(), second.end(), all.begin() + N);
  return all;
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_OPTIONS_H_
