#include "framework/registry/options.h"

#include <gtest/gtest.h>

#include <array>

#include "framework/base/error.h"

namespace sikv {
namespace {

constexpr std::array<sikv_option_spec, 6> kSpecs = {{
    {"page", SIKV_OPTION_INT, 0, 1, 4096, nullptr, "16", "-"},
    {"bits", SIKV_OPTION_INT, 0, 0, 0, "2|4|8", "4", "-"},
    {"share", SIKV_OPTION_FLOAT, 0, 0, 1, nullptr, "0.5", "-"},
    {"exact", SIKV_OPTION_BOOL, 0, 0, 1, nullptr, "false", "-"},
    {"metric", SIKV_OPTION_CHOICE, 0, 0, 0, "mean|max", "mean", "-"},
    {"budget", SIKV_OPTION_BUDGET, 0, 0, 0, nullptr, "256", "-"},
}};
using Given = std::vector<std::pair<std::string, std::string>>;

OptionSet parse(const Given& given) { return OptionSet::parse(kSpecs, given, "selector 'quest'"); }

std::string error_of(const Given& given) {
  try {
    parse(given);
  } catch (const Error& error) {
    return error.what();
  }
  return "parsed";
}

TEST(OptionSet, FillsInDefaultsInTheOrderOfTheList) {
  const OptionSet set = parse({{"metric", "max"}, {"page", "2K"}});
  ASSERT_EQ(set.values().size(), kSpecs.size());
  EXPECT_STREQ(set.values()[0].name, "page");
  EXPECT_EQ(set.values()[0].i, 2048);
  EXPECT_STREQ(set.values()[0].text, "2K");
  EXPECT_EQ(set.find("bits")->i, 4);
  EXPECT_EQ(set.find("share")->f, 0.5);
  EXPECT_EQ(set.find("exact")->i, 0);
  EXPECT_STREQ(set.find("metric")->text, "max");
  EXPECT_EQ(set.find("budget")->i, 256);
  EXPECT_EQ(set.find("other"), nullptr);
}

TEST(OptionSet, SurvivesAMove) {
  OptionSet set = parse({{"metric", "max"}});
  const OptionSet moved = std::move(set);
  EXPECT_STREQ(moved.find("metric")->text, "max");
}

TEST(OptionSet, BudgetsAreCountsOrFractions) {
  EXPECT_EQ(parse({{"budget", "64K"}}).find("budget")->i, 65536);
  EXPECT_EQ(parse({{"budget", "0"}}).find("budget")->i, 0);
  const OptionSet set = parse({{"budget", "0.075"}});
  EXPECT_EQ(set.find("budget")->i, -1);
  EXPECT_EQ(set.find("budget")->f, 0.075);
  for (const char* bad : {"-1", "1.5", "0.0", "1.0", "", "half", "5k", "nan"}) {
    EXPECT_EQ(error_of({{"budget", bad}}),
              std::string("selector 'quest': budget is '") + bad +
                  "', expected a count of tokens (2048, 64K) or a fraction between 0 and 1");
  }
}

TEST(OptionSet, RefusesWithWhatIsAllowed) {
  EXPECT_EQ(error_of({{"page", "0"}}),
            "selector 'quest': page is '0', expected an integer from 1 to 4096");
  EXPECT_EQ(error_of({{"page", "1.5"}}),
            "selector 'quest': page is '1.5', expected an integer from 1 to 4096");
  EXPECT_EQ(error_of({{"bits", "3"}}), "selector 'quest': bits is '3', expected one of 2, 4, 8");
  EXPECT_EQ(error_of({{"share", "2"}}),
            "selector 'quest': share is '2', expected a number from 0 to 1");
  EXPECT_EQ(error_of({{"share", "inf"}}),
            "selector 'quest': share is 'inf', expected a number from 0 to 1");
  EXPECT_EQ(error_of({{"exact", "yes"}}),
            "selector 'quest': exact is 'yes', expected true or false");
  EXPECT_EQ(error_of({{"metric", "sum"}}),
            "selector 'quest': metric is 'sum', expected one of mean, max");
  EXPECT_EQ(error_of({{"bugdet", "1"}}),
            "selector 'quest' has no option 'bugdet'; did you mean 'budget'?");
  EXPECT_EQ(error_of({{"zzzzzz", "1"}}),
            "selector 'quest' has no option 'zzzzzz'; it takes page, bits, share, exact, metric, "
            "budget");
  EXPECT_EQ(error_of({{"page", "1"}, {"page", "1"}}),
            "selector 'quest': option 'page' is given twice");
}

TEST(AllowedText, LeavesOutMissingBounds) {
  sikv_option_spec spec = {"n", SIKV_OPTION_INT, 0, 1, 1e18, nullptr, "1", "-"};
  EXPECT_EQ(allowed_text(spec), "an integer of at least 1");
  spec.min = -1e18;
  EXPECT_EQ(allowed_text(spec), "an integer");
  spec.max = 4;
  EXPECT_EQ(allowed_text(spec), "an integer of at most 4");
}

TEST(ParseCount, KnowsItsLimits) {
  EXPECT_EQ(parse_count("9223372036854775807"), INT64_MAX);
  EXPECT_EQ(parse_count("9223372036854775808"), std::nullopt);
  EXPECT_EQ(parse_count("9007199254740991K"), 9007199254740991 * 1024);
  EXPECT_EQ(parse_count("9007199254740992K"), std::nullopt);
  EXPECT_EQ(parse_count("-2M"), -2097152);
  for (const char* bad : {"", "K", "1 K", "1KK", "+1", "0x10", "1e3"}) {
    EXPECT_EQ(parse_count(bad), std::nullopt) << bad;
  }
}

}  // namespace
}  // namespace sikv
