// What a rare scan loses, and what schedule and refresh save: a key planted for one step only.
#include <gtest/gtest.h>

#include "framework/config/pipeline_text.h"
#include "framework/experiment/measure.h"
#include "framework/experiment/source.h"
#include "tests/support/plugins.h"

namespace sikv {
namespace {

struct Outcome {
  double dropped_mass, scans_per_step;
};

class Needle : public ::testing::Test {
 protected:
  Needle() : device_(testing::cpu(3)), source_(make_source()), exact_(source_, device_) {}

  Outcome run(const std::string& options) {
    const auto spec =
        parse_pipeline("rot_lm+rot_lm > self_index(budget=64," + options + ") > sparse_flash",
                       testing::registry());
    const auto measured = measure_pipeline(spec, testing::registry(), device_, source_, exact_,
                                           {0, 0, {"dropped_mass"}});
    return {measured.metrics.at("dropped_mass").mean,
            measured.counters.at("scans") / measured.counters.at("rows")};
  }

 private:
  static Source make_source() {
    Config config;
    config.model = ModelSpec{"", 2, 8, 2, 64, 10000.0, 0};
    config.source.synthetic = SyntheticSpec{"needle", {4096}, {1}, false, "fp16", 7};
    config.source.steps = 32;
    return load_source(config);
  }

  Device& device_;
  Source source_;
  ExactReference exact_;
};

TEST_F(Needle, ScanningEveryStepFindsItAndScanningRarelyDoesNot) {
  const Outcome always = run("rerank=4");
  EXPECT_DOUBLE_EQ(always.scans_per_step, 1.0);
  EXPECT_LT(always.dropped_mass, 0.2);

  const Outcome rarely = run("rerank=4,scan_every=8");
  EXPECT_NEAR(rarely.scans_per_step, 1.0 / 8, 0.01);
  // The needle holds more than half of the mass and 7 of 8 are missed.
  EXPECT_GT(rarely.dropped_mass, always.dropped_mass + 0.3);

  const Outcome refreshed = run("rerank=4,scan_every=8,refresh_cosine=0.45");
  EXPECT_LT(refreshed.dropped_mass, always.dropped_mass + 0.05);
  EXPECT_GT(refreshed.scans_per_step, rarely.scans_per_step);
  EXPECT_LE(refreshed.scans_per_step, 1.0);
}

TEST_F(Needle, TheScheduleWithRefreshIsSafe) {
  const Outcome always = run("rerank=4");
  const Outcome both = run("rerank=4,schedule=auto,tolerance=0.01,refresh_cosine=0.45");
  EXPECT_LT(both.dropped_mass, always.dropped_mass + 0.05);
}

}  // namespace
}  // namespace sikv
