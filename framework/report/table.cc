#include "framework/report/table.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <utility>

#include "framework/base/error.h"

namespace sikv {
namespace {

constexpr int kIndent = 2;
constexpr int kGap = 2;
// A label narrower than this is not worth breaking into a column.
constexpr int kNarrowestLabel = 40;

constexpr std::string_view kBold = "\x1b[1m";
constexpr std::string_view kGreen = "\x1b[32m";
constexpr std::string_view kPlain = "\x1b[0m";

// Takes one code point, or one stray byte as itself, from the front of `text`.
uint32_t next_code_point(std::string_view& text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  const size_t length = lead < 0xc0 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  uint32_t code = length == 1 ? lead : lead & (0x7fu >> length);
  for (size_t i = 1; i < length; ++i) {
    if (i >= text.size() || (byte(i) & 0xc0) != 0x80) {
      text.remove_prefix(1);
      return lead;
    }
    code = code << 6 | (byte(i) & 0x3fu);
  }
  text.remove_prefix(length);
  return code;
}

struct Range {
  uint32_t first, last;
};
// Marks that join the character before them.
constexpr std::array<Range, 3> kZeroWidth = {{{0x300, 0x36f}, {0x200b, 0x200d}, {0xfe00, 0xfe0f}}};
// East Asian characters and emoji, which take two columns.
constexpr std::array<Range, 8> kDoubleWidth = {{{0x1100, 0x115f},
                                                {0x2e80, 0xa4cf},
                                                {0xac00, 0xd7a3},
                                                {0xf900, 0xfaff},
                                                {0xfe30, 0xfe6f},
                                                {0xff00, 0xff60},
                                                {0x1f300, 0x1faff},
                                                {0x20000, 0x3fffd}}};

template <size_t N>
bool within(const std::array<Range, N>& ranges, uint32_t code) {
  return std::any_of(ranges.begin(), ranges.end(),
                     [&](Range r) { return r.first <= code && code <= r.last; });
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t from = 0;
  for (size_t at = 0; (at = text.find(separator, from)) != std::string::npos; from = at + 1) {
    parts.push_back(text.substr(from, at - from));
  }
  parts.push_back(text.substr(from));
  return parts;
}

// Lines of whole words; a word that is too long, as a selector with many options is, breaks behind
// commas, and a part without one gets a line of its own.
std::vector<std::string> wrap(const std::string& text, int width) {
  std::vector<std::string> lines;
  for (const std::string& word : split(text, ' ')) {
    std::string glue = " ";
    std::vector<std::string> parts = {word};
    if (display_width(word) > width) parts = split(word, ',');
    for (size_t i = 0; i < parts.size(); ++i) {
      const std::string part = parts[i] + (i + 1 < parts.size() ? "," : "");
      if (lines.empty() || display_width(lines.back() + glue + part) > width) {
        lines.push_back(part);
      } else {
        lines.back() += glue + part;
      }
      glue.clear();
    }
  }
  return lines;
}

std::string spaces(int n) { return std::string(static_cast<size_t>(std::max(n, 0)), ' '); }

std::string padded(const std::string& text, int width, Table::Align align) {
  const std::string fill = spaces(width - display_width(text));
  return align == Table::Align::kLeft ? text + fill : fill + text;
}

void append_line(std::string& to, std::string line) {
  line.erase(line.find_last_not_of(' ') + 1);
  to += line + "\n";
}

std::string coloured(const std::string& text, std::string_view colour, bool on) {
  return on ? std::string(colour) + text + std::string(kPlain) : text;
}

}  // namespace

int display_width(std::string_view text) {
  int width = 0;
  while (!text.empty()) {
    const uint32_t code = next_code_point(text);
    width += within(kZeroWidth, code) ? 0 : within(kDoubleWidth, code) ? 2 : 1;
  }
  return width;
}

TableStyle TableStyle::of(std::FILE* stream) {
  const int number = fileno(stream);
  if (isatty(number) != 1) {
    const char* columns = std::getenv("COLUMNS");
    return {columns == nullptr ? 0 : std::max(std::atoi(columns), 0), false};
  }
  winsize size{};
  const bool known = ioctl(number, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  const char* no_colour = std::getenv("NO_COLOR");
  return {known ? size.ws_col : 100, no_colour == nullptr || *no_colour == '\0'};
}

Table::Table(std::vector<Column> columns, std::string label)
    : columns_(std::move(columns)), label_(std::move(label)) {}

void Table::group(std::string title) { groups_.push_back({std::move(title), {}}); }

void Table::row(std::vector<Cell> cells, std::string label, bool competes) {
  SIKV_ASSERT(cells.size() == columns_.size());
  if (groups_.empty()) group("");
  groups_.back().rows.push_back({std::move(cells), std::move(label), competes});
}

std::optional<double> Table::best(const Group& group, size_t column) const {
  const Better better = columns_[column].better;
  if (better == Better::kNeither) return std::nullopt;
  std::vector<double> values;
  for (const Row& row : group.rows) {
    const auto value = row.cells[column].value;
    if (row.competes && value && !std::isnan(*value)) values.push_back(*value);
  }
  if (values.empty()) return std::nullopt;
  const auto [lowest, highest] = std::minmax_element(values.begin(), values.end());
  if (*lowest == *highest) return std::nullopt;
  return better == Better::kLower ? *lowest : *highest;
}

std::string Table::text(const TableStyle& style) const {
  std::vector<std::vector<std::string>> headers;
  std::vector<int> widths;
  size_t header_lines = 1;
  int numbers_width = kIndent;
  for (size_t c = 0; c < columns_.size(); ++c) {
    headers.push_back(split(columns_[c].header, '\n'));
    header_lines = std::max(header_lines, headers.back().size());
    int width = 0;
    for (const std::string& line : headers.back()) width = std::max(width, display_width(line));
    for (const Group& group : groups_) {
      for (const Row& row : group.rows) {
        width = std::max(width, display_width(row.cells[c].text));
      }
    }
    widths.push_back(width);
    numbers_width += width + (columns_[c].better != Better::kNeither) + kGap;
  }
  int label_width = display_width(label_);
  for (const Group& group : groups_) {
    for (const Row& row : group.rows) {
      label_width = std::max(label_width, display_width(row.label));
    }
  }
  const bool fits = style.width == 0 || numbers_width + label_width <= style.width;
  const bool beside = fits || style.width - numbers_width >= kNarrowestLabel;
  const int room = fits     ? label_width
                   : beside ? style.width - numbers_width
                            : std::max(style.width - kIndent, kNarrowestLabel);

  std::string text;
  if (!beside && !label_.empty()) {
    append_line(text, coloured(spaces(kIndent) + label_, kBold, style.colour));
  }
  for (size_t i = 0; i < header_lines; ++i) {
    std::string line = spaces(kIndent);
    for (size_t c = 0; c < columns_.size(); ++c) {
      const auto& header = headers[c];
      const size_t blank = header_lines - header.size();
      line += padded(i < blank ? "" : header[i - blank], widths[c], columns_[c].align);
      line += spaces((columns_[c].better != Better::kNeither) + kGap);
    }
    if (beside && i + 1 == header_lines) line += label_;
    line.erase(line.find_last_not_of(' ') + 1);
    append_line(text, coloured(line, kBold, style.colour));
  }
  for (const Group& group : groups_) {
    if (!group.title.empty()) append_line(text, coloured(group.title, kBold, style.colour));
    std::vector<std::optional<double>> marks;
    for (size_t c = 0; c < columns_.size(); ++c) marks.push_back(best(group, c));
    for (const Row& row : group.rows) {
      const std::vector<std::string> label = wrap(row.label, room);
      if (!beside) {
        for (const std::string& line : label) append_line(text, spaces(kIndent) + line);
      }
      std::string line = spaces(kIndent);
      for (size_t c = 0; c < columns_.size(); ++c) {
        const Cell& cell = row.cells[c];
        const bool marked = marks[c] && row.competes && cell.value == marks[c];
        const std::string shown = padded(cell.text, widths[c], columns_[c].align);
        line += coloured(marked ? shown + "*" : shown, kGreen, marked && style.colour);
        line += spaces(kGap + (columns_[c].better != Better::kNeither && !marked));
      }
      append_line(text, beside ? line + label[0] : line);
      for (size_t i = 1; beside && i < label.size(); ++i) {
        append_line(text, spaces(numbers_width) + label[i]);
      }
    }
  }
  return text;
}

}  // namespace sikv
