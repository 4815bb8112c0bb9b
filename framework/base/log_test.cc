#include "framework/base/log.h"

#include <gtest/gtest.h>

#include <string>

#include "framework/base/error.h"

namespace sikv {
namespace {

TEST(Log, WarnsByDefaultOnStderr) {
  ::testing::internal::CaptureStderr();
  log().info("hidden");
  log().warn("shown {}", 7);
  log().flush();
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "sikv: warning: shown 7\n");
}

TEST(Log, LevelByName) {
  set_log_level("error");
  EXPECT_EQ(log().level(), spdlog::level::err);
  set_log_level("warn");
  EXPECT_EQ(log().level(), spdlog::level::warn);
  try {
    set_log_level("wran");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(
        error.what(),
        "log level 'wran' is not one of trace, debug, info, warn, error, off; did you mean "
        "'warn'?");
  }
}

}  // namespace
}  // namespace sikv
