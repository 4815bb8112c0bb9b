#include "framework/base/interrupt.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>

#include "framework/base/error.h"
#include "framework/base/progress.h"

namespace sikv {
namespace {

// The flag is never cleared, so every case runs in a process of its own.
class InterruptDeathTest : public ::testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST(Interrupt, NothingHappensWithoutASignal) {
  EXPECT_FALSE(interrupted());
  EXPECT_NO_THROW(check_interrupt());
}

TEST_F(InterruptDeathTest, FirstSignalBecomesAnException) {
  for (const int signal : {SIGINT, SIGTERM}) {
    EXPECT_EXIT(
        {
          install_interrupt_handler();
          std::raise(signal);
          try {
            check_interrupt();
          } catch (const Interrupted&) {
            std::_Exit(interrupted() ? Interrupted::kExitCode : 1);
          }
          std::_Exit(2);
        },
        ::testing::ExitedWithCode(130), "");
  }
}

TEST_F(InterruptDeathTest, SecondSignalKills) {
  EXPECT_EXIT(
      {
        install_interrupt_handler();
        std::raise(SIGINT);
        std::raise(SIGINT);
        std::_Exit(0);
      },
      ::testing::KilledBySignal(SIGINT), "");
}

TEST_F(InterruptDeathTest, ProgressAsks) {
  EXPECT_EXIT(
      {
        install_interrupt_handler();
        Progress progress("work", 10);
        std::raise(SIGINT);
        try {
          progress.add(1);
        } catch (const Interrupted&) {
          std::_Exit(Interrupted::kExitCode);
        }
        std::_Exit(0);
      },
      ::testing::ExitedWithCode(130), "");
}

}  // namespace
}  // namespace sikv
