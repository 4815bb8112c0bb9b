#include "framework/registry/options.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "framework/base/error.h"
#include "framework/base/text.h"

namespace sikv {
namespace {

// Bounds at least this far out mean "none": a double no longer holds every integer there.
constexpr double kUnbounded = 9007199254740992.0;  // 2^53

std::string range_text(std::string_view noun, double min, double max) {
  const bool low = min > -kUnbounded, high = max < kUnbounded;
  if (low && high) return fmt::format("{} from {} to {}", noun, min, max);
  if (low) return fmt::format("{} of at least {}", noun, min);
  if (high) return fmt::format("{} of at most {}", noun, max);
  return std::string(noun);
}

bool fill(const sikv_option_spec& spec, const std::string& text, sikv_option_value& value) {
  const auto is_choice = [&] {
    const std::vector<std::string> choices = option_choices(spec);
    return std::find(choices.begin(), choices.end(), text) != choices.end();
  };
  switch (spec.type) {
    case SIKV_OPTION_INT: {
      const std::optional<int64_t> number = parse_count(text);
      if (!number) return false;
      value.i = *number;
      if (spec.choices != nullptr) return is_choice();
      return spec.min <= static_cast<double>(*number) && static_cast<double>(*number) <= spec.max;
    }
    case SIKV_OPTION_FLOAT: {
      const std::optional<double> number = parse_number(text);
      if (!number) return false;
      value.f = *number;
      return spec.min <= *number && *number <= spec.max;
    }
    case SIKV_OPTION_BOOL:
      value.i = text == "true";
      return text == "true" || text == "false";
    case SIKV_OPTION_CHOICE:
      return is_choice();
    case SIKV_OPTION_BUDGET: {
      if (const std::optional<int64_t> count = parse_count(text)) {
        value.i = *count;
        return *count >= 0;
      }
      const std::optional<double> fraction = parse_number(text);
      if (!fraction) return false;
      value.i = -1;
      value.f = *fraction;
      return 0 < *fraction && *fraction < 1;
    }
    case SIKV_OPTION_SELECTOR:
      return !text.empty();
    case SIKV_OPTION_TEXT:
      // What the one-line form of a pipeline can quote.
      return text.find_first_of("\"\n\r") == std::string::npos;
    default:
      return false;
  }
}

}  // namespace

std::optional<int64_t> parse_count(std::string_view text) {
  int shift = 0;
  if (text.ends_with('K')) shift = 10;
  if (text.ends_with('M')) shift = 20;
  if (shift != 0) text.remove_suffix(1);
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  if (number > kMax >> shift || number < -(kMax >> shift)) return std::nullopt;
  return number * (int64_t{1} << shift);
}

std::optional<double> parse_number(std::string_view text) {
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(number)) {
    return std::nullopt;
  }
  return number;
}

std::vector<std::string> option_choices(const sikv_option_spec& spec) {
  std::vector<std::string> choices;
  if (spec.choices == nullptr) return choices;
  std::string_view rest = spec.choices;
  for (;;) {
    const size_t bar = rest.find('|');
    choices.emplace_back(rest.substr(0, bar));
    if (bar == std::string_view::npos) return choices;
    rest.remove_prefix(bar + 1);
  }
}

std::string allowed_text(const sikv_option_spec& spec) {
  if (spec.choices != nullptr) return "one of " + join(option_choices(spec));
  switch (spec.type) {
    case SIKV_OPTION_INT:
      return range_text("an integer", spec.min, spec.max);
    case SIKV_OPTION_FLOAT:
      return range_text("a number", spec.min, spec.max);
    case SIKV_OPTION_BOOL:
      return "true or false";
    case SIKV_OPTION_BUDGET:
      return "a count of tokens (2048, 64K) or a fraction between 0 and 1";
    case SIKV_OPTION_SELECTOR:
      return "a map such as {name: quest, budget: 1024}";
    case SIKV_OPTION_TEXT:
      return "a text of one line without double quotes";
    default:
      return fmt::format("a value of the unknown type {}", spec.type);
  }
}

const sikv_option_spec& find_option(std::span<const sikv_option_spec> specs, std::string_view name,
                                    std::string_view owner) {
  std::vector<std::string> names;
  for (const sikv_option_spec& spec : specs) {
    if (name == spec.name) return spec;
    names.emplace_back(spec.name);
  }
  if (names.empty()) throw Error("{} has no option '{}': it takes none", owner, name);
  const std::string near = did_you_mean(name, names);
  throw Error("{} has no option '{}'{}", owner, name,
              near.empty() ? "; it takes " + join(names) : near);
}

const sikv_option_spec* wrapper_option(std::span<const sikv_option_spec> specs) {
  const auto found = std::find_if(specs.begin(), specs.end(), [](const sikv_option_spec& spec) {
    return spec.type == SIKV_OPTION_SELECTOR;
  });
  return found == specs.end() ? nullptr : &*found;
}

sikv_option_value parse_option(const sikv_option_spec& spec, const std::string& text,
                               std::string_view owner) {
  sikv_option_value value{};
  value.name = spec.name;
  value.type = spec.type;
  value.text = text.c_str();
  if (!fill(spec, text, value)) {
    throw Error("{}: {} is '{}', expected {}", owner, spec.name, text, allowed_text(spec));
  }
  return value;
}

OptionSet OptionSet::parse(std::span<const sikv_option_spec> specs,
                           std::span<const std::pair<std::string, std::string>> given,
                           std::string_view owner) {
  std::vector<const std::string*> texts(specs.size(), nullptr);
  for (const auto& [name, text] : given) {
    const size_t i = static_cast<size_t>(&find_option(specs, name, owner) - specs.data());
    if (texts[i] != nullptr) throw Error("{}: option '{}' is given twice", owner, name);
    texts[i] = &text;
  }
  OptionSet set;
  for (size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].type == SIKV_OPTION_SELECTOR && texts[i] == nullptr) {
      throw Error("{} wraps another selector and has none; add {}: {{name: ...}} ({})", owner,
                  specs[i].name, specs[i].help);
    }
    set.texts_.push_back(texts[i] != nullptr ? *texts[i] : specs[i].default_value);
    set.values_.push_back(parse_option(specs[i], set.texts_.back(), owner));
  }
  return set;
}

const sikv_option_value* OptionSet::find(std::string_view name) const {
  for (const sikv_option_value& value : values_) {
    if (name == value.name) return &value;
  }
  return nullptr;
}

}  // namespace sikv
