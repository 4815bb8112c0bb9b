// Points over two logarithmic axes, each better the smaller, as an SVG: one series per method, with
// the front of those that nothing beats in both.
#ifndef SIKV_FRAMEWORK_REPORT_SCATTER_H_
#define SIKV_FRAMEWORK_REPORT_SCATTER_H_

#include <span>
#include <string>
#include <vector>

namespace sikv {

struct ScatterPoint {
  double x = 0, y = 0;
};

struct ScatterSeries {
  std::string label;
  size_t group = 0;  // index of its group: its colour
  std::vector<ScatterPoint> points;
  bool competes = true;  // else drawn pale, and not part of the front
};

struct Scatter {
  std::string title, x_axis, y_axis;
  std::vector<std::string> groups;
  std::vector<ScatterSeries> series;
};

// Which points no other one beats: smaller in one coordinate and no larger in the other.
std::vector<bool> pareto_front(std::span<const ScatterPoint> points);

// The y axis spans one decade at most: points below stand on its lower edge. Points that are not
// positive are left out.
std::string scatter_svg(const Scatter& scatter);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REPORT_SCATTER_H_
