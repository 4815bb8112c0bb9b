#include "framework/report/heat_map.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "framework/base/error.h"
#include "framework/report/svg.h"

namespace sikv {
namespace {

// Pixels.
constexpr int kCellWidth = 56, kCellHeight = 24, kLeft = 96, kTitle = 40, kAxis = 40, kGap = 16;

// From near white to a dark blue.
std::string colour(double share) {
  const auto mix = [&](int pale, int dark) {
    return static_cast<int>(std::lround(pale + std::clamp(share, 0.0, 1.0) * (dark - pale)));
  };
  return fmt::format("#{:02x}{:02x}{:02x}", mix(0xf3, 0x0b), mix(0xf6, 0x3d), mix(0xfa, 0x91));
}

int height_of(const HeatMap& map) {
  return kTitle + static_cast<int>(map.rows.size()) * kCellHeight + kAxis + kGap;
}

int width_of(const HeatMap& map) {
  const int cells = kLeft + static_cast<int>(map.columns.size()) * kCellWidth + kGap;
  const auto title = static_cast<int>(svg_text_width(map.title)) + 2 * kGap;
  return std::max(cells, title);
}

std::string label(int x, int y, const char* anchor, const char* fill, const std::string& text) {
  return fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"{}\" fill=\"{}\">{}</text>\n", x, y,
                     anchor, fill, svg_escaped(text));
}

std::string panel(const HeatMap& map, int top) {
  constexpr const char* kInk = "#24292f";
  SIKV_ASSERT(map.shares.size() == map.rows.size());
  std::string svg = label(kGap, top + 16, "start", kInk, map.title);
  svg += label(kLeft - 8, top + kTitle - 6, "end", kInk, map.row_axis);
  const auto left = [](size_t column) { return kLeft + static_cast<int>(column) * kCellWidth; };
  for (size_t r = 0; r < map.rows.size(); ++r) {
    SIKV_ASSERT(map.shares[r].size() == map.columns.size());
    const int y = top + kTitle + static_cast<int>(r) * kCellHeight;
    svg += label(kLeft - 8, y + 16, "end", kInk, map.rows[r]);
    for (size_t c = 0; c < map.columns.size(); ++c) {
      const double share = map.shares[r][c];
      svg += fmt::format(
          "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\" stroke=\"white\"/>\n",
          left(c), y, kCellWidth, kCellHeight, colour(share));
      svg += label(left(c) + kCellWidth / 2, y + 16, "middle", share > 0.5 ? "white" : kInk,
                   fmt::format("{:.2f}", share));
    }
  }
  const int below = top + kTitle + static_cast<int>(map.rows.size()) * kCellHeight;
  for (size_t c = 0; c < map.columns.size(); ++c) {
    svg += label(left(c) + kCellWidth / 2, below + 16, "middle", kInk, map.columns[c]);
  }
  svg += label(kLeft + static_cast<int>(map.columns.size()) * kCellWidth / 2, below + 34, "middle",
               kInk, map.column_axis);
  return svg;
}

}  // namespace

std::string heat_map_svg(std::span<const HeatMap> panels) {
  int width = 0, height = kGap;
  for (const HeatMap& map : panels) {
    width = std::max(width, width_of(map));
    height += height_of(map);
  }
  std::string body;
  int top = kGap;
  for (const HeatMap& map : panels) {
    body += panel(map, top);
    top += height_of(map);
  }
  return svg_document(width, height, body);
}

}  // namespace sikv
