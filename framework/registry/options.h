// Text of a config -> typed option values, checked against a plugin's own list.
#ifndef SIKV_FRAMEWORK_REGISTRY_OPTIONS_H_
#define SIKV_FRAMEWORK_REGISTRY_OPTIONS_H_

#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "plugins/abi/sikv_abi.h"

namespace sikv {

// The complete options of one instance, defaults filled in, in the order of the plugin's list.
class OptionSet {
 public:
  OptionSet() = default;
  OptionSet(const OptionSet&) = delete;
  OptionSet& operator=(const OptionSet&) = delete;
  OptionSet(OptionSet&&) = default;
  OptionSet& operator=(OptionSet&&) = default;

  // `given` holds name and text as written; of a wrapper's base the id, under the option's name.
  // Errors name the option, the text, what is allowed and, for an unknown name, the nearest valid
  // one.
  static OptionSet parse(std::span<const sikv_option_spec> specs,
                         std::span<const std::pair<std::string, std::string>> given,
                         std::string_view owner);

  std::span<const sikv_option_value> values() const { return values_; }
  const sikv_option_value* find(std::string_view name) const;

 private:
  std::deque<std::string> texts_;  // owns what values_ point to
  std::vector<sikv_option_value> values_;
};

// Checks one text against one option; returns the value or throws Error. The value points to
// spec.name and to `text`.
sikv_option_value parse_option(const sikv_option_spec& spec, const std::string& text,
                               std::string_view owner);

// The option called `name`; Error with the nearest name, or the list, if there is none.
const sikv_option_spec& find_option(std::span<const sikv_option_spec> specs, std::string_view name,
                                    std::string_view owner);

// The option that makes a selector a wrapper, or nullptr.
const sikv_option_spec* wrapper_option(std::span<const sikv_option_spec> specs);

// What an option takes, to follow "expected": "an integer from 1 to 8", "one of 2, 4, 8".
std::string allowed_text(const sikv_option_spec& spec);

// The parts of "a|b|c"; empty for NULL.
std::vector<std::string> option_choices(const sikv_option_spec& spec);

// Whole numbers as people write token counts: 2048, 64K, 1M (K = 1024). Nothing if `text` is not
// one or does not fit.
std::optional<int64_t> parse_count(std::string_view text);

// A finite decimal number and nothing else.
std::optional<double> parse_number(std::string_view text);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REGISTRY_OPTIONS_H_
