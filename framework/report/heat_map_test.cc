#include "framework/report/heat_map.h"

#include <gtest/gtest.h>

namespace sikv {
namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(HeatMap, CellsAreColouredAndNumbered) {
  const HeatMap map{"single: a+b > c & d", "tokens", "depth", {"1024"}, {"0 %", "100 %"}, {{0, 1}}};
  const std::string svg = heat_map_svg(std::vector{map});
  for (const char* part :
       {"<svg xmlns", "</svg>", "single: a+b &gt; c &amp; d", ">1024<", ">0 %<", ">100 %<",
        "fill=\"#f3f6fa\"", "fill=\"#0b3d91\"", ">0.00<", ">1.00<", ">tokens<", ">depth<"}) {
    EXPECT_TRUE(contains(svg, part)) << part << "\n" << svg;
  }
}

TEST(HeatMap, PanelsStandBelowEachOther) {
  const HeatMap map{"t", "r", "c", {"a"}, {"b"}, {{0.5}}};
  const std::string one = heat_map_svg(std::vector{map}), two = heat_map_svg(std::vector{map, map});
  EXPECT_TRUE(contains(one, "height=\"136\""));
  EXPECT_TRUE(contains(two, "height=\"256\""));
}

}  // namespace
}  // namespace sikv
