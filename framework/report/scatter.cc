#include "framework/report/scatter.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "framework/base/error.h"
#include "framework/report/svg.h"

namespace sikv {
namespace {

// Pixels.
constexpr double kLeft = 70, kTop = 48, kWidth = 760, kHeight = 720, kBelow = 56, kGap = 16;
constexpr double kLegendLine = 17, kDot = 4, kLetter = 6.2, kLineHeight = 11;
constexpr const char* kInk = "#24292f";
constexpr const char* kGrid = "#e4e8ec";
constexpr const char* kPale = "#9aa4ae";
// Told apart by everyone, after Okabe and Ito.
constexpr std::array<const char*, 7> kColours = {"#56789a", "#0072b2", "#009e73", "#d55e00",
                                                 "#cc79a7", "#a07800", "#6a3d9a"};
constexpr const char* kDashes = "stroke-width=\"1.5\" stroke-dasharray=\"5 4\"";
constexpr double kMostDecades = 1;

struct Axis {
  double low, high;  // logarithms
  double from, length;

  double at(double value) const {
    const double share = (std::log10(value) - low) / (high - low);
    return from + std::clamp(share, 0.0, 1.0) * length;
  }
};

struct Box {
  double left, top, right, bottom;

  double overlap(const Box& other) const {
    const double w = std::min(right, other.right) - std::max(left, other.left);
    const double h = std::min(bottom, other.bottom) - std::max(top, other.top);
    return w > 0 && h > 0 ? w * h : 0;
  }
};

bool drawn(const ScatterPoint& point) { return point.x > 0 && point.y > 0; }

// 1, 2 and 5 of every decade.
std::vector<double> ticks(const Axis& axis) {
  std::vector<double> values;
  for (int decade = static_cast<int>(std::floor(axis.low)); decade <= axis.high; ++decade) {
    for (const double digit : {1.0, 2.0, 5.0}) {
      const double value = digit * std::pow(10.0, decade);
      const double place = std::log10(value);
      if (place >= axis.low - 1e-9 && place <= axis.high + 1e-9) values.push_back(value);
    }
  }
  return values;
}

std::string tick_text(double value) {
  if (value >= 1e6) return fmt::format("{:g}M", value / 1e6);
  if (value >= 1e3) return fmt::format("{:g}K", value / 1e3);
  return fmt::format("{:g}", value);
}

std::string text(double x, double y, const char* anchor, const std::string& fill, int size,
                 const std::string& words) {
  return fmt::format(
      "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" fill=\"{}\" font-size=\"{}\">{}</text>\n",
      x, y, anchor, fill, size, svg_escaped(words));
}

std::string line(double x1, double y1, double x2, double y2, const std::string& colour,
                 double width) {
  return fmt::format(
      "<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\" "
      "stroke-width=\"{}\"/>\n",
      x1, y1, x2, y2, colour, width);
}

class Drawing {
 public:
  explicit Drawing(const Scatter& scatter) : scatter_(scatter) {
    double x[2] = {std::numeric_limits<double>::max(), 0}, y[2] = {x[0], 0};
    for (const ScatterSeries& series : scatter.series) {
      for (const ScatterPoint& point : series.points) {
        if (!drawn(point)) continue;
        x[0] = std::min(x[0], point.x), x[1] = std::max(x[1], point.x);
        y[0] = std::min(y[0], point.y), y[1] = std::max(y[1], point.y);
      }
    }
    if (x[1] == 0) x[0] = x[1] = y[0] = y[1] = 1;
    constexpr double kMargin = 0.06;
    const double top = std::log10(y[1]) + kMargin;
    x_ = {std::log10(x[0]) - kMargin, std::log10(x[1]) + kMargin, kLeft, kWidth};
    cut_ = std::log10(y[0]) < top - kMostDecades;
    y_ = {std::max(std::log10(y[0]), top - kMostDecades) - kMargin, top, kTop + kHeight, -kHeight};
  }

  std::string svg() {
    std::string body = text(kGap, 24, "start", kInk, 14, scatter_.title) + axes() + front();
    for (const ScatterSeries& series : scatter_.series) body += steps(series);
    place_dots();
    for (size_t i = 0; i < scatter_.series.size(); ++i) body += dots(scatter_.series[i], i + 1);
    const double height = std::max(kTop + kHeight + kBelow, legend_bottom());
    return svg_document(static_cast<int>(kLeft + kWidth + kGap + legend_width()),
                        static_cast<int>(height), body + legend());
  }

 private:
  std::string colour(const ScatterSeries& series) const {
    return series.competes ? kColours[series.group % kColours.size()] : kPale;
  }

  std::string axes() const {
    std::string svg;
    for (const double value : ticks(x_)) {
      const double x = x_.at(value);
      svg += line(x, kTop, x, kTop + kHeight, kGrid, 1);
      svg += text(x, kTop + kHeight + 18, "middle", kInk, 12, tick_text(value));
    }
    for (const double value : ticks(y_)) {
      const double y = y_.at(value);
      svg += line(kLeft, y, kLeft + kWidth, y, kGrid, 1);
      svg += text(kLeft - 8, y + 4, "end", kInk, 12, tick_text(value));
    }
    svg += text(kLeft + kWidth / 2, kTop + kHeight + 40, "middle", kInk, 12, scatter_.x_axis);
    const std::string y_axis =
        scatter_.y_axis + (cut_ ? " (points on the lower edge lie below it)" : "");
    return svg + fmt::format(
                     "<text transform=\"translate(18,{:.1f}) rotate(-90)\" text-anchor=\"middle\" "
                     "fill=\"{}\">{}</text>\n",
                     kTop + kHeight / 2, kInk, svg_escaped(y_axis));
  }

  // A staircase: up to its next point a point is the best there is.
  std::string front() const {
    std::vector<ScatterPoint> all;
    for (const ScatterSeries& series : scatter_.series) {
      if (!series.competes) continue;
      for (const ScatterPoint& point : series.points) {
        if (drawn(point)) all.push_back(point);
      }
    }
    const std::vector<bool> on = pareto_front(all);
    std::vector<ScatterPoint> points;
    for (size_t i = 0; i < all.size(); ++i) {
      if (on[i]) points.push_back(all[i]);
    }
    std::sort(points.begin(), points.end(),
              [](const ScatterPoint& a, const ScatterPoint& b) { return a.x < b.x; });
    if (points.empty()) return "";
    std::string path;
    for (size_t i = 0; i < points.size(); ++i) {
      const double x = x_.at(points[i].x), y = y_.at(points[i].y);
      path += i == 0 ? fmt::format("M{:.1f} {:.1f}", x, y) : fmt::format("H{:.1f}V{:.1f}", x, y);
    }
    return fmt::format("<path d=\"{}H{:.1f}\" fill=\"none\" stroke=\"{}\" {}/>\n", path,
                       kLeft + kWidth, kInk, kDashes);
  }

  // The points of one method, joined.
  std::string steps(const ScatterSeries& series) const {
    std::string points;
    for (const ScatterPoint& point : series.points) {
      if (drawn(point)) points += fmt::format("{:.1f},{:.1f} ", x_.at(point.x), y_.at(point.y));
    }
    return fmt::format(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-opacity=\"0.35\"/>\n", points,
        colour(series));
  }

  void place_dots() {
    for (const ScatterSeries& series : scatter_.series) {
      for (const ScatterPoint& point : series.points) {
        const double x = x_.at(point.x), y = y_.at(point.y);
        if (drawn(point)) taken_.push_back({x - kDot, y - kDot, x + kDot, y + kDot});
      }
    }
  }

  // Dots with the number of their method beside them, where there is room.
  std::string dots(const ScatterSeries& series, size_t number) {
    std::string svg;
    for (const ScatterPoint& point : series.points) {
      if (!drawn(point)) continue;
      const double x = x_.at(point.x), y = y_.at(point.y);
      svg += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\" fill=\"{}\"/>\n", x, y,
                         series.competes ? kDot : kDot - 1, colour(series));
      svg += number_beside(x, y, std::to_string(number), colour(series));
    }
    return svg;
  }

  std::string number_beside(double x, double y, const std::string& number,
                            const std::string& fill) {
    const double width = kLetter * static_cast<double>(number.size());
    Box best{};
    double least = std::numeric_limits<double>::max();
    double distance = 0;
    constexpr int kDirections = 12;
    for (const double away : {11.0, 16.0, 23.0, 31.0, 40.0}) {
      for (int i = 0; i < kDirections && least > 0; ++i) {
        const double angle = 2 * 3.14159265358979 * (i - 2) / kDirections;
        const double cx = x + away * std::cos(angle), cy = y + away * std::sin(angle);
        const Box box{cx - width / 2, cy - kLineHeight / 2, cx + width / 2, cy + kLineHeight / 2};
        double overlap = box.left < kLeft || box.right > kLeft + kWidth || box.top < kTop ||
                                 box.bottom > kTop + kHeight
                             ? width * kLineHeight
                             : 0;
        for (const Box& other : taken_) overlap += box.overlap(other);
        if (overlap < least) best = box, least = overlap, distance = away;
      }
    }
    taken_.push_back(best);
    const double cx = (best.left + best.right) / 2, cy = (best.top + best.bottom) / 2;
    std::string svg;
    if (distance > 16) {
      const double share = 1 - 7 / distance;
      svg += line(x, y, x + (cx - x) * share, y + (cy - y) * share, fill, 0.6);
    }
    return svg + text(cx, cy + 4, "middle", fill, 11, number);
  }

  double legend_width() const {
    double width = 0;
    for (const ScatterSeries& s : scatter_.series) {
      width = std::max(width, svg_text_width(s.label) + 34);
    }
    for (const std::string& group : scatter_.groups) {
      width = std::max(width, svg_text_width(group));
    }
    return width + kGap;
  }

  double legend_bottom() const {
    const auto lines = scatter_.series.size() + scatter_.groups.size() + 2;
    return kTop + kLegendLine * static_cast<double>(lines) +
           static_cast<double>(scatter_.groups.size()) * 6 + kGap;
  }

  std::string legend() const {
    const double left = kLeft + kWidth + kGap;
    double y = kTop + 8;
    std::string svg;
    for (size_t group = 0; group < scatter_.groups.size(); ++group) {
      svg += text(left, y, "start", kInk, 12, scatter_.groups[group]);
      y += kLegendLine;
      for (size_t i = 0; i < scatter_.series.size(); ++i) {
        const ScatterSeries& series = scatter_.series[i];
        if (series.group != group) continue;
        svg += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\" fill=\"{}\"/>\n", left + 6,
                           y - 4, kDot, colour(series));
        svg += text(left + 28, y, "end", colour(series), 11, std::to_string(i + 1));
        svg += text(left + 34, y, "start", kInk, 12, series.label);
        y += kLegendLine;
      }
      y += 6;
    }
    svg += fmt::format("<path d=\"M{0:.1f} {1:.1f}h28\" stroke=\"{2}\" {3}/>\n", left, y - 4, kInk,
                       kDashes);
    return svg + text(left + 34, y, "start", kInk, 12, "Pareto front");
  }

  const Scatter& scatter_;
  Axis x_{}, y_{};
  bool cut_ = false;  // points lie below the y axis
  std::vector<Box> taken_;
};

}  // namespace

std::vector<bool> pareto_front(std::span<const ScatterPoint> points) {
  std::vector<bool> on;
  for (const ScatterPoint& point : points) {
    on.push_back(std::none_of(points.begin(), points.end(), [&](const ScatterPoint& other) {
      return other.x <= point.x && other.y <= point.y && (other.x < point.x || other.y < point.y);
    }));
  }
  return on;
}

std::string scatter_svg(const Scatter& scatter) {
  for (const ScatterSeries& series : scatter.series)
    SIKV_ASSERT(series.group < scatter.groups.size());
  return Drawing(scatter).svg();
}

}  // namespace sikv
