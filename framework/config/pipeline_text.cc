#include "framework/config/pipeline_text.h"

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "framework/base/error.h"
#include "framework/config/pipeline_parts.h"
#include "framework/registry/options.h"

namespace sikv {
namespace {

// What follows each part: keys + values > selector > attention.
constexpr std::array<std::string_view, 4> kSeparators = {"+", " > ", " > ", ""};

// What ends a value, unless it is quoted.
constexpr std::string_view kValueEnds = ",()";

std::string value_text(const sikv_option_spec& option, const std::string& value) {
  const bool quoted = option.type == SIKV_OPTION_TEXT &&
                      (value.empty() || value.find_first_of(",() \t") != std::string::npos);
  return quoted ? "\"" + value + "\"" : value;
}

std::string plugin_text(const PipelineSpec& spec, const PipelinePart& part,
                        const PluginSpec& plugin, const Registry& registry) {
  std::string text = plugin.id;
  if (const std::string* variant = forced_variant(spec, part, plugin.id)) {
    text += "[" + *variant + "]";
  }

  std::string options;
  const auto add = [&](std::string_view name, std::string_view value) {
    options += fmt::format("{}{}={}", options.empty() ? "" : ",", name, value);
  };
  for (const sikv_option_spec& option : registry.options(part.kind, plugin.id)) {
    if (option.type == SIKV_OPTION_SELECTOR) {
      for (const PluginSpec& base : plugin.base) {
        add(option.name, plugin_text(spec, part, base, registry));
      }
    }
    for (const auto& [name, value] : plugin.options) {
      if (name == option.name) add(name, value_text(option, value));
    }
  }
  if (&plugin == &spec.selector) {
    const PipelineSpec defaults;
    for (const sikv_option_spec& option : selector_common_options()) {
      const std::string value = selector_common_option(spec, option.name);
      // The pinned count is printed always: no result can be read without it.
      if (option.name == std::string_view("pinned") ||
          value != selector_common_option(defaults, option.name)) {
        add(option.name, value);
      }
    }
  }
  return options.empty() ? text : fmt::format("{}({})", text, options);
}

// Far above any real chain of wrappers.
constexpr int kMaxDepth = 8;

// pipeline := plugin '+' plugin '>' plugin '>' plugin ['@' device]
// plugin   := id ['[' variant ']'] ['(' [option {',' option}] ')']
// option   := name '=' value | name '=' '"' text '"' | 'base' '=' plugin
class Parser {
 public:
  Parser(std::string_view text, const Registry& registry) : text_(text), registry_(registry) {}

  PipelineSpec run() {
    PipelineSpec spec;
    for (size_t i = 0; i < kPipelineParts.size(); ++i) {
      part(spec, kPipelineParts[i]);
      if (i == 0) expect('+', "between key codec and value codec");
      if (i == 1) expect('>', "before the selector");
      if (i == 2) expect('>', "before the attention kernel");
    }
    if (accept('@')) {
      const size_t start = skip_spaces();
      spec.device = word("a device after '@'");
      if (accept(':')) spec.device += ":" + word("the number of a GPU after ':'");
      at(start, [&] { check_device_name(spec.device); });
    }
    skip_spaces();
    if (next_ < text_.size()) fail(next_, "'@device' or the end");
    return spec;
  }

 private:
  void part(PipelineSpec& spec, const PipelinePart& part) {
    const size_t start = skip_spaces();
    plugin(spec, part, spec.*part.plugin);
    at(start, [&] { check_part(spec, part, registry_); });
  }

  void plugin(PipelineSpec& spec, const PipelinePart& part, PluginSpec& plugin) {
    const size_t start = skip_spaces();
    plugin.id = word(fmt::format("the name of a {}", kind_name(part.kind)));
    at(start, [&] { static_cast<void>(registry_.options(part.kind, plugin.id)); });
    if (accept('[')) {
      const size_t place = skip_spaces();
      const std::string variant = word("a variant after '['");
      at(place, [&] { force_variant(spec, part, plugin.id, variant, registry_); });
      expect(']', "after the variant");
    }
    if (accept('(') && !accept(')')) {
      do {
        option(spec, part, plugin);
      } while (accept(','));
      expect(')', "or ',' after an option");
    }
  }

  void option(PipelineSpec& spec, const PipelinePart& part, PluginSpec& plugin) {
    const size_t start = skip_spaces();
    std::string name = word("the name of an option");
    expect('=', fmt::format("after option '{}'", name));
    if (wraps(part, plugin, name)) {
      if (!plugin.base.empty()) {
        throw Error("column {}: option '{}' is given twice", start + 1, name);
      }
      if (++depth_ > kMaxDepth) {
        throw Error("column {}: more than {} selectors wrap each other, which no config needs",
                    start + 1, kMaxDepth);
      }
      plugin.base.emplace_back();
      this->plugin(spec, part, plugin.base.back());
      return;
    }
    std::string value = this->value();
    if (next_ < text_.size() && text_[next_] == '(') {
      // A base for a plugin that takes none.
      at(start, [&] {
        static_cast<void>(find_option(registry_.options(part.kind, plugin.id), name,
                                      fmt::format("{} '{}'", kind_name(part.kind), plugin.id)));
      });
    }
    if (part.kind == SIKV_SELECTOR && is_selector_common_option(name)) {
      if (&plugin != &spec.selector) at(start, [&] { refuse_common_option_of_base(name); });
      if (!common_.insert(name).second) {
        throw Error("column {}: option '{}' is given twice", start + 1, name);
      }
      at(start, [&] { set_selector_common_option(spec, name, value); });
    } else {
      plugin.options.emplace_back(std::move(name), std::move(value));
    }
  }

  bool wraps(const PipelinePart& part, const PluginSpec& plugin, std::string_view name) const {
    const sikv_option_spec* base = wrapper_option(registry_.options(part.kind, plugin.id));
    return base != nullptr && name == base->name;
  }

  std::string value() {
    if (accept('"')) {
      const size_t start = next_, end = text_.find('"', start);
      if (end == std::string_view::npos) fail(text_.size(), "'\"' at the end of a text");
      next_ = end + 1;
      return std::string(text_.substr(start, end - start));
    }
    skip_spaces();
    const size_t end = std::min(text_.find_first_of(kValueEnds, next_), text_.size());
    std::string value(text_.substr(next_, end - next_));
    while (!value.empty() && is_space(value.back())) value.pop_back();
    next_ = end;
    return value;
  }

  static bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

  size_t skip_spaces() {
    while (next_ < text_.size() && is_space(text_[next_])) ++next_;
    return next_;
  }

  bool accept(char c) {
    skip_spaces();
    if (next_ == text_.size() || text_[next_] != c) return false;
    ++next_;
    return true;
  }

  void expect(char c, std::string_view where) {
    if (!accept(c)) fail(next_, fmt::format("'{}' {}", c, where));
  }

  std::string word(std::string_view what) {
    const size_t start = skip_spaces();
    const auto in_word = [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
             c == '_' || c == '-' || c == '.';
    };
    while (next_ < text_.size() && in_word(text_[next_])) ++next_;
    if (next_ == start) fail(start, what);
    return std::string(text_.substr(start, next_ - start));
  }

  // "column 12: expected ')' or ',' after an option, found 'x'"
  [[noreturn]] void fail(size_t place, std::string_view what) const {
    const std::string found =
        place < text_.size() ? fmt::format("'{}'", text_[place]) : std::string("the end");
    throw Error("column {}: expected {}, found {}", place + 1, what, found);
  }

  // Runs `check`; its Error gets the column in front.
  template <typename Check>
  void at(size_t place, Check&& check) const {
    try {
      check();
    } catch (const Error& error) {
      throw Error("column {}: {}", place + 1, error.what());
    }
  }

  std::string_view text_;
  const Registry& registry_;
  size_t next_ = 0;
  int depth_ = 0;
  std::set<std::string> common_;  // options of every selector that were given
};

}  // namespace

std::string pipeline_text(const PipelineSpec& spec, const Registry& registry) {
  std::string text;
  for (size_t i = 0; i < kPipelineParts.size(); ++i) {
    text += plugin_text(spec, kPipelineParts[i], spec.*kPipelineParts[i].plugin, registry);
    text += kSeparators[i];
  }
  return spec.device == "auto" ? text : text + " @" + spec.device;
}

PipelineSpec parse_pipeline(std::string_view text, const Registry& registry) {
  return Parser(text, registry).run();
}

}  // namespace sikv
