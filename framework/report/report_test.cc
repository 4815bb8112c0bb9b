#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <limits>

#include "framework/base/error.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"
#include "tests/support/temporary.h"

namespace sikv {
namespace {

Table two_metrics() {
  return Table({{"error", Table::Align::kRight, Table::Better::kLower},
                {"recall", Table::Align::kRight, Table::Better::kHigher}},
               "pipeline");
}

TEST(Table, MarksTheBestOfEachGroup) {
  Table table = two_metrics();
  table.group("budget 96");
  table.row({{"0.20", 0.20}, {"0.50", 0.50}}, "a > b > c");
  table.row({{"0.10", 0.10}, {"0.40", 0.40}}, "d > e > f");
  table.row({{"0.01", 0.01}, {"1.00", 1.00}}, "oracle", false);
  table.group("budget 192");
  table.row({{"0.30", 0.30}, {"0.60", 0.60}}, "a > b > c");
  table.row({{"nan", std::numeric_limits<double>::quiet_NaN()}, {"0.70", 0.70}}, "d > e > f");
  EXPECT_EQ(table.text(),
            "  error   recall   pipeline\n"
            "budget 96\n"
            "   0.20     0.50*  a > b > c\n"
            "   0.10*    0.40   d > e > f\n"
            "   0.01     1.00   oracle\n"
            "budget 192\n"
            "   0.30     0.60   a > b > c\n"
            "    nan     0.70*  d > e > f\n");
}

TEST(Table, MarksEveryRowThatTies) {
  Table table({{"x", Table::Align::kRight, Table::Better::kLower}});
  table.row({{"1", 1.0}});
  table.row({{"1", 1.0}});
  table.row({{"2", 2.0}});
  EXPECT_EQ(table.text(), "  x\n  1*\n  1*\n  2\n");
}

TEST(Table, MarksNobodyWhereAllAreAlike) {
  Table table({{"x", Table::Align::kRight, Table::Better::kLower}});
  table.row({{"1", 1.0}});
  table.row({{"1", 1.0}});
  EXPECT_EQ(table.text(), "  x\n  1\n  1\n");
}

TEST(Table, HeadersOfSeveralLinesStandOnTheLast) {
  Table table({{"name", Table::Align::kLeft}, {"bytes\nper token"}});
  table.row({{"raw"}, {"512"}});
  EXPECT_EQ(table.text(),
            "            bytes\n"
            "  name  per token\n"
            "  raw         512\n");
}

TEST(Table, WrapsLabelsBesideTheRowWhereThereIsRoom) {
  Table table({{"x"}}, "pipeline");
  table.row({{"1"}}, "first(option=value)+second(option=value) > third(option=value)");
  EXPECT_EQ(table.text({50, false}),
            "  x  pipeline\n"
            "  1  first(option=value)+second(option=value) >\n"
            "     third(option=value)\n");
}

TEST(Table, PutsLabelsAboveTheRowWhereThereIsNone) {
  Table table({{"a wide column of numbers"}}, "pipeline");
  table.row({{"1"}}, "first(option=value)+second(option=value) > third(option=value)");
  EXPECT_EQ(table.text({60, false}),
            "  pipeline\n"
            "  a wide column of numbers\n"
            "  first(option=value)+second(option=value) >\n"
            "  third(option=value)\n"
            "                         1\n");
}

TEST(Table, BreaksLongOptionListsBehindCommas) {
  Table table({{"x"}}, "pipeline");
  table.row({{"1"}},
            "keys+values > selector(first=value,second=value,third=value,fourth=value) > k");
  EXPECT_EQ(table.text({50, false}),
            "  x  pipeline\n"
            "  1  keys+values > selector(first=value,\n"
            "     second=value,third=value,fourth=value) > k\n");
}

TEST(Table, ColoursHeaderAndBest) {
  Table table({{"x", Table::Align::kRight, Table::Better::kLower}});
  table.row({{"1", 1.0}});
  table.row({{"2", 2.0}});
  EXPECT_EQ(table.text({0, true}),
            "\x1b[1m  x\x1b[0m\n"
            "  \x1b[32m1*\x1b[0m\n"
            "  2\n");
}

TEST(Table, CountsColumnsNotBytes) {
  EXPECT_EQ(display_width("abc"), 3);
  EXPECT_EQ(display_width("\u00b5s"), 2);       // micro sign
  EXPECT_EQ(display_width("e\u0301"), 1);       // combining accent
  EXPECT_EQ(display_width("\u7f13\u5b58"), 4);  // two wide characters
  EXPECT_EQ(display_width("\U0001f600"), 2);    // emoji
  EXPECT_EQ(display_width("\xff\xfe"), 2);      // not UTF-8
  EXPECT_EQ(display_width("\xe2\x82"), 2);      // cut off
  EXPECT_EQ(display_width(""), 0);
}

TEST(Table, APipeGetsNoColourAndNoLimit) {
  unsetenv("COLUMNS");
  std::FILE* const file = std::tmpfile();
  const TableStyle style = TableStyle::of(file);
  std::fclose(file);
  EXPECT_EQ(style.width, 0);
  EXPECT_FALSE(style.colour);
}

TEST(Table, APipeIsAsWideAsColumnsSays) {
  setenv("COLUMNS", "120", 1);
  std::FILE* const file = std::tmpfile();
  const TableStyle style = TableStyle::of(file);
  std::fclose(file);
  unsetenv("COLUMNS");
  EXPECT_EQ(style.width, 120);
}

Measured example() {
  Measured measured;
  measured.pipeline = "fp16+fp16 > quest(budget=96,page=16) > gather_attention";
  measured.budget = 96;
  measured.variants = {{"keys", "fp16", "ref"}, {"selector", "quest", "cpu"}};
  measured.metrics["recall"] = {0.5, 0.6, 0.25, 0.125, BadSide::kLow};
  measured.bytes_per_token = 256;
  measured.compression = 1;
  measured.compression_total = 0.75;
  measured.memory_per_token = 272;
  measured.scan_bytes = 30720;
  measured.attended_bytes = 90000;
  measured.tokens_selected = 95.5;
  measured.ledger.add("value_code", 1000);
  measured.ledger.add("tail", 24);
  measured.prefill_s = {{"fit", 0.5}};
  measured.step_s["select"] = {2e-6, 1e-6, 3e-6, 4e-6, BadSide::kHigh};
  measured.step_s["attend"] = {2.5e-6, 2e-6, 3e-6, 4e-6, BadSide::kHigh};
  measured.counters = {{"scans", 31}};
  return measured;
}

TEST(Rows, JsonHasThePublishedShape) {
  EXPECT_EQ(row_json(example()), nlohmann::ordered_json::parse(R"({
    "pipeline": "fp16+fp16 > quest(budget=96,page=16) > gather_attention", "budget": 96,
    "metrics": {"recall": {"mean": 0.5, "p95": 0.25, "p99": 0.125}, "bytes_per_token": 256.0,
                "compression": 1.0, "compression_total": 0.75, "memory_per_token": 272.0},
    "memory": {"value_code": 1000, "tail": 24, "total": 1024},
    "latency_us": {"prefill": {"fit": 500000.0},
                   "attend": {"mean": 2.5, "median": 2.0, "p95": 3.0},
                   "select": {"mean": 2.0, "median": 1.0, "p95": 3.0}},
    "variants": {"keys": "ref", "selector": "cpu"}, "counters": {"scans": 31.0},
    "bytes_read": {"scan": 30720.0, "attended": 90000.0}, "tokens_selected": 95.5})"));
}

TEST(Rows, JsonIsReadBackAsWritten) {
  Measured measured = example();
  for (const bool bare : {false, true}) {
    if (bare) {
      measured.budget.reset();
      measured.scan_bytes.reset();
      measured.attended_bytes.reset();
      measured.tokens_selected.reset();
      measured.metrics["kv_error"] = summarize({}, BadSide::kHigh);
    }
    const std::string text = row_json(measured).dump();
    const Measured read = measured_of(nlohmann::ordered_json::parse(text));
    EXPECT_EQ(row_json(read).dump(), text);
    EXPECT_EQ(read.metrics.at("recall").bad, BadSide::kLow);
  }
  EXPECT_THROW(measured_of({{"pipeline", "a"}}), nlohmann::json::exception);
}

TEST(Rows, SumsCountWhatIsNotDoneAtEveryStep) {
  // A scan at every fourth step, a page encoded at every sixteenth.
  std::vector<double> select(16, 1.0), append(16, 0.5), attend(16, 3.0);
  for (size_t step = 0; step < 16; step += 4) select[step] = 9.0;
  append[0] = 16.5;
  std::map<std::string, Summary> step_s = {{"select", summarize(select, BadSide::kHigh)},
                                           {"append", summarize(append, BadSide::kHigh)},
                                           {"attend", summarize(attend, BadSide::kHigh)}};
  EXPECT_DOUBLE_EQ(step_seconds(step_s), 3.0 + 1.5 + 3.0);
  EXPECT_DOUBLE_EQ(attention_seconds(step_s), 3.0 + 3.0);
}

TEST(Rows, JsonWithoutABudgetSaysNull) {
  Measured measured = example();
  measured.budget.reset();
  EXPECT_TRUE(row_json(measured)["budget"].is_null());
}

TEST(Rows, CsvHasAColumnForEveryValueOfTheJson) {
  const std::string csv = rows_csv(std::vector{row_json(example())});
  EXPECT_EQ(csv.substr(0, csv.find('\r')),
            "pipeline,budget,metrics.recall.mean,metrics.recall.p95,metrics.recall.p99,"
            "metrics.bytes_per_token,metrics.compression,metrics.compression_total,"
            "metrics.memory_per_token,memory.value_code,memory.tail,memory.total,"
            "latency_us.prefill.fit,latency_us.attend.mean,latency_us.attend.median,"
            "latency_us.attend.p95,latency_us.select.mean,latency_us.select.median,"
            "latency_us.select.p95,variants.keys,variants.selector,counters.scans,"
            "bytes_read.scan,bytes_read.attended,tokens_selected");
}

TEST(Rows, CsvQuotesAndLeavesGaps) {
  const std::vector<nlohmann::ordered_json> rows = {
      {{"pipeline", "a > b(c=1,d=2)"}, {"budget", 96}, {"m", {{"mean", 0.5}}}},
      {{"pipeline", "a \"quoted\" one"},
       {"budget", nullptr},
       {"on_front", true},
       {"m", {{"p99", 1.0}}}}};
  EXPECT_EQ(rows_csv(rows),
            "pipeline,budget,m.mean,on_front,m.p99\r\n"
            "\"a > b(c=1,d=2)\",96,0.5,,\r\n"
            "\"a \"\"quoted\"\" one\",,,true,1\r\n");
}

TEST(Rows, UnwritablePathsAreFoundAhead) {
  EXPECT_THROW(check_writable("/dev/full"), Error);
  EXPECT_THROW(check_writable("/no/such/folder/x.json"), Error);
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "rows.json";
  check_writable(path);
  EXPECT_FALSE(std::filesystem::exists(path));
  write_json(path, {{"rows", nlohmann::ordered_json::array()}});
  EXPECT_EQ(nlohmann::json::parse(std::ifstream(path))["rows"].size(), 0u);
}

TEST(Environment, NamesCodeAndMachine) {
  const auto device = open_cpu_device(2);
  const std::vector<std::string> command = {"sikv", "run", "a b.yaml"};
  const auto block = environment(command, *device);
  EXPECT_EQ(block["sikv"], version());
  EXPECT_EQ(block["commit"], commit());
  EXPECT_EQ(block["command"], "sikv run 'a b.yaml'");
  EXPECT_EQ(block["device"]["type"], "cpu");
  EXPECT_EQ(block["device"]["threads"], 2);
  EXPECT_EQ(block["date_utc"].get<std::string>().size(), 20u);
  for (const char* key : {"cpu", "cores", "memory_bytes", "os", "compiler", "build_type"}) {
    EXPECT_TRUE(block.contains(key)) << key;
  }
}

TEST(Environment, DateAndCommandDoNotTellMachinesApart) {
  const auto device = open_cpu_device(1);
  const auto a = environment(std::vector<std::string>{"sikv"}, *device);
  auto b = a;
  b["command"] = "sikv compare";
  b["date_utc"] = "";
  EXPECT_TRUE(same_environment(a, b));
  b["commit"] = "another";
  EXPECT_FALSE(same_environment(a, b));
  EXPECT_FALSE(same_environment(a, nlohmann::ordered_json::object()));
}

}  // namespace
}  // namespace sikv
