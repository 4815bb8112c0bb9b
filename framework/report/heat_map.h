// Shares between 0 and 1 over two axes, as an SVG of small multiples: one panel below the other,
// pale = 0, dark = 1, the number in every cell.
#ifndef SIKV_FRAMEWORK_REPORT_HEAT_MAP_H_
#define SIKV_FRAMEWORK_REPORT_HEAT_MAP_H_

#include <span>
#include <string>
#include <vector>

namespace sikv {

struct HeatMap {
  std::string title;
  std::string row_axis, column_axis;
  std::vector<std::string> rows, columns;
  std::vector<std::vector<double>> shares;  // [rows][columns]
};

std::string heat_map_svg(std::span<const HeatMap> panels);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REPORT_HEAT_MAP_H_
