// The numbers of an independent implementation on the shipped real trace, held from both sides: a
// pipeline that suddenly gets better has changed too.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "framework/base/error.h"
#include "framework/config/config.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/measure.h"
#include "plugins/sdk/plugin.h"
#include "tests/support/plugins.h"

namespace sikv {
namespace {

struct Expected {
  double dropped_mass, recall, output_error;
};

// Measures every (pipeline, budget) of a config in configs/ and compares it with `expected`, by
// pipeline in the config's order, then by budget. `recalls` gets the mean recalls in that order.
void check_config(const std::string& name, const std::vector<std::vector<Expected>>& expected,
                  const std::vector<double>& bytes_per_token, size_t random_row,
                  std::vector<std::vector<double>>* recalls = nullptr) {
  Registry registry;
  registry.add_folder(SIKV_PLUGIN_FOLDER);
  Config config = load_config(std::string(SIKV_SOURCE_DIR) + "/configs/" + name, {}, registry);
  ASSERT_EQ(config.pipelines.size(), expected.size());
  const Source source = load_source(config);
  ExactReference exact(source, testing::cpu(3));
  const MeasureSpec measure{0, 0, {"dropped_mass", "recall", "output_error"}};
  for (size_t p = 0; p < expected.size(); ++p) {
    Config one = config;
    one.pipelines = {config.pipelines[p]};
    const auto specs = expand_budgets(one, registry);
    ASSERT_EQ(specs.size(), expected[p].size());
    if (recalls != nullptr) recalls->emplace_back();
    for (size_t b = 0; b < specs.size(); ++b) {
      const Measured measured =
          measure_pipeline(specs[b], registry, testing::cpu(3), source, exact, measure);
      const Expected& want = expected[p][b];
      const double slack = p == random_row ? 0.02 : 0.01;
      SCOPED_TRACE(measured.pipeline);
      if (recalls != nullptr) recalls->back().push_back(measured.metrics.at("recall").mean);
      EXPECT_NEAR(measured.metrics.at("dropped_mass").mean, want.dropped_mass, slack);
      EXPECT_NEAR(measured.metrics.at("recall").mean, want.recall, 0.02);
      EXPECT_NEAR(measured.metrics.at("output_error").mean, want.output_error, slack);
      EXPECT_DOUBLE_EQ(measured.bytes_per_token, bytes_per_token[p]);
    }
  }
}

TEST(Reference, SevenRowTable) {
  std::vector<std::vector<double>> recalls;
  check_config("reference.yaml",
               {
                   {{0.114, 1, 0.134}, {0.094, 1, 0.126}, {0.069, 1, 0.119}},
                   {{0.149, 0.291, 0.152}, {0.128, 0.387, 0.144}, {0.099, 0.509, 0.130}},
                   {{0.149, 0.286, 0.152}, {0.129, 0.383, 0.144}, {0.099, 0.505, 0.130}},
                   {{0.164, 0.177, 0.140}, {0.145, 0.267, 0.116}, {0.117, 0.393, 0.092}},
                   {{0.141, 0.366, 0.124}, {0.120, 0.466, 0.108}, {0.092, 0.576, 0.091}},
                   {{0.122, 0.708, 0.099}, {0.098, 0.808, 0.085}, {0.071, 0.876, 0.072}},
                   {{0.184, 0.027, 0.170}, {0.180, 0.053, 0.164}, {0.169, 0.106, 0.149}},
               },
               {56, 56, 56, 256, 44, 44, 256}, 6, &recalls);
  // What 6-bit tables may cost.
  for (size_t b = 0; b < 3; ++b) EXPECT_LE(recalls[1][b] - recalls[2][b], 0.01);
}

// ---- what 6-bit tables cost, and how much they select alike ----------------------------------------

// Slots of every row, layer and step that a Recording selected, in order.
std::vector<std::vector<int32_t>>& selections() {
  static std::vector<std::vector<int32_t>> selections;
  return selections;
}

// Selects what its base does.
class Recording : public WrappingSelector {
 public:
  using WrappingSelector::WrappingSelector;
  void run(const sikv_select_args& args, const CacheView& view, Launch launch) override {
    WrappingSelector::run(args, view, launch);
    for (int row = 0; row < view.num_rows(); ++row) {
      const auto slots = SelectionRow(args.selection, row).slots();
      selections().emplace_back(slots.begin(), slots.end());
    }
  }
};
std::unique_ptr<ScoringSelector> make_recording(const CreateArgs& args) {
  return std::make_unique<Recording>(args);
}
constexpr sikv_option_spec kRecordingOptions[] = {selector_option("what is recorded")};

void add_recording(Registry& registry) {
  static const sikv_plugin_entry entry = scoring_selector<make_recording, kRecordingOptions>("ref");
  static const sikv_plugin_tables_t tables = {sizeof tables, 1, &entry};
  registry.add_linked(
      "linked/recording",
      sdk::descriptor("recording", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR), "", ""),
      &tables);
}

// The share of the slots that two runs have in common, of all that they selected.
double overlap(const std::vector<std::vector<int32_t>>& a,
               const std::vector<std::vector<int32_t>>& b) {
  EXPECT_EQ(a.size(), b.size());
  double common = 0, all = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    std::vector<int32_t> both;
    std::set_intersection(a[i].begin(), a[i].end(), b[i].begin(), b[i].end(),
                          std::back_inserter(both));
    EXPECT_EQ(a[i].size(), b[i].size());
    common += static_cast<double>(both.size());
    all += static_cast<double>(a[i].size());
  }
  return common / all;
}

// At D 64 the overlaps are 0.953 to 0.971 (sign_vq) and 0.975 to 0.984 (rot_lm) on the real trace
// and 0.969 or more on synthetic ones. At D 128 twice as many roundings add up: rot_lm at 96 has
// 0.963 to 0.968 over seeds of clustered and needle, so that the bound is 0.005 lower there. Rounding
// shows: were the tables exact, all would be the same.
TEST(SixBitTables, SelectWhatExactOnesDo) {
  Registry registry;
  registry.add_folder(SIKV_PLUGIN_FOLDER);
  add_recording(registry);
  Config real;
  real.source.trace = SIKV_SOURCE_DIR "/datasets/smollm2-135m-4k.h5";
  real.source.prompt = 4064;
  real.source.steps = 31;
  const auto synthetic = [](const char* kind, int head_dim) {
    Config config;
    config.model = ModelSpec{"", 2, 8, 2, head_dim, 10000.0, 0};
    config.source.synthetic = SyntheticSpec{kind, {4096}, {1}, false, "fp16", 7};
    config.source.steps = 16;
    return config;
  };
  for (const Config& config : {real, synthetic("gaussian", 64), synthetic("clustered", 64),
                               synthetic("clustered", 128), synthetic("needle", 128)}) {
    const Source source = load_source(config);
    ExactReference exact(source, testing::cpu(3));
    for (const auto& [keys, least] : {std::pair("sign_vq", 0.94), std::pair("rot_lm", 0.965)}) {
      for (const int budget : {96, 192, 384}) {
        const auto recall = [&](const char* tables) {
          selections().clear();
          const PipelineSpec spec = parse_pipeline(
              fmt::format("{}+fp16 > recording(base=self_index(budget={},tables={}),pinned=64) > "
                          "gather_attention",
                          keys, budget, tables),
              registry);
          return measure_pipeline(spec, registry, testing::cpu(3), source, exact,
                                  {0, 0, {"recall"}})
              .metrics.at("recall")
              .mean;
        };
        SCOPED_TRACE(fmt::format("{}, {}, budget {}", source.text, keys, budget));
        const double exactly = recall("exact");
        const auto selected = selections();
        const double rounded = recall("6bit");
        EXPECT_GE(rounded, exactly - 0.01);
        const double common = overlap(selected, selections());
        EXPECT_GE(common, source.head_dim == 64 ? least : least - 0.005);
        EXPECT_LT(common, 1);
      }
    }
  }
}

TEST(Reference, CandidatePoolTable) {
  // rot_lm keys at D = 64: 26 bytes; exact values: 128.
  check_config("reference_pool.yaml",
               {
                   {{0.144, 0.383, 0.111}, {0.122, 0.482, 0.096}, {0.093, 0.587, 0.079}},
                   {{0.125, 0.725, 0.091}, {0.100, 0.817, 0.077}, {0.072, 0.880, 0.063}},
                   {{0.134, 0.637, 0.106}, {0.107, 0.764, 0.088}, {0.075, 0.862, 0.068}},
                   {{0.129, 0.736, 0.101}, {0.101, 0.833, 0.082}, {0.072, 0.887, 0.063}},
               },
               {154, 154, 154, 154}, 99);
}

}  // namespace
}  // namespace sikv
