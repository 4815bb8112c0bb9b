#include "framework/report/scatter.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace sikv {
namespace {

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST(Scatter, TheFrontIsWhatNothingBeats) {
  const std::vector<ScatterPoint> points = {{1, 5}, {2, 5}, {2, 3}, {3, 3}, {4, 1}, {4, 1}, {5, 2}};
  EXPECT_EQ(pareto_front(points), (std::vector<bool>{true, false, true, false, true, true, false}));
  EXPECT_TRUE(pareto_front({}).empty());
}

TEST(Scatter, DrawsEveryPointNumbersItAndListsItsMethod) {
  const Scatter scatter{"error & bytes",
                        "bytes",
                        "error",
                        {"large", "small"},
                        {{"a<b", 0, {{1000, 0.5}, {2000, 0.3}}, true},
                         {"bound", 1, {{100, 0.1}}, false},
                         {"c", 1, {{500, 0.4}}, true}}};
  const std::string svg = scatter_svg(scatter);
  EXPECT_EQ(count(svg, "<circle"), 4u + 3u);
  for (const char* part : {"error &amp; bytes", ">a&lt;b<", ">bound<", ">large<", ">small<", ">1K<",
                           ">0.5<", ">Pareto front<", "stroke-dasharray"}) {
    EXPECT_GE(count(svg, part), 1u) << part << "\n" << svg;
  }
  EXPECT_EQ(count(svg, ">1<"), 2u + 1u);  // beside two points and in the legend
}

// No two numbers share a place, however close their points are.
TEST(Scatter, NumbersMakeRoomForEachOther) {
  Scatter scatter{"t", "x", "y", {"g"}, {}};
  for (int i = 0; i < 12; ++i) {
    scatter.series.push_back({"m", 0, {{1000.0 + i, 0.2}}, true});
  }
  scatter.series.push_back({"far", 0, {{9000, 0.02}}, true});
  const std::string svg = scatter_svg(scatter);
  std::vector<std::string> places;
  for (size_t at = svg.find("text-anchor=\"middle\" fill=\"#56789a\""); at != std::string::npos;
       at = svg.find("text-anchor=\"middle\" fill=\"#56789a\"", at + 1)) {
    const size_t from = svg.rfind("<text", at);
    places.push_back(svg.substr(from, at - from));
  }
  EXPECT_EQ(places.size(), 13u);
  std::sort(places.begin(), places.end());
  EXPECT_EQ(std::unique(places.begin(), places.end()), places.end());
}

TEST(Scatter, NothingToDrawIsAnEmptyFigure) {
  const std::string svg = scatter_svg({"t", "x", "y", {"g"}, {{"zero", 0, {{0, 0.5}}, true}}});
  EXPECT_EQ(count(svg, "</svg>"), 1u);
  EXPECT_EQ(count(svg, "nan"), 0u);
}

}  // namespace
}  // namespace sikv
