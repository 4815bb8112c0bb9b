#include "framework/base/progress.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

namespace sikv {
namespace {

TEST(ProgressLine, ShowsShareRateAndTimeLeft) {
  EXPECT_EQ(progress_line("layers", 5, 10, 2.0, 100),
            "layers  [##########          ]  50 %  2.5/s  2.00 s left");
  EXPECT_EQ(progress_line("tokens", 2000000, 2000000, 1.0, 100),
            "tokens  [####################] 100 %  2.0M/s");
  EXPECT_EQ(progress_line("none", 0, 0, 0, 100), "none  [####################] 100 %  0.0/s");
}

TEST(ProgressLine, NeverWraps) {
  EXPECT_EQ(progress_line("a long label", 1, 2, 1, 20).size(), 19u);
}

// Runs the work with stderr on a pseudo terminal and returns what arrived there.
std::string on_terminal(std::chrono::milliseconds pause) {
  const int leader = ::posix_openpt(O_RDWR | O_NOCTTY);
  if (leader < 0 || ::grantpt(leader) != 0 || ::unlockpt(leader) != 0) return "no terminal";
  const int follower = ::open(::ptsname(leader), O_RDWR | O_NOCTTY);
  if (follower < 0) {
    ::close(leader);
    return "no terminal";
  }
  const int saved = ::dup(STDERR_FILENO);
  ::dup2(follower, STDERR_FILENO);
  {
    Progress progress("work", 2);
    progress.add();
    std::this_thread::sleep_for(pause);
    progress.add();
  }
  ::dup2(saved, STDERR_FILENO);
  ::close(saved);
  ::fcntl(leader, F_SETFL, O_NONBLOCK);
  // A terminal hands its output on piece by piece.
  std::string text;
  char piece[4096];
  pollfd ready{leader, POLLIN, 0};
  while (::poll(&ready, 1, 200) > 0) {
    const ssize_t size = ::read(leader, piece, sizeof piece);
    if (size <= 0) break;
    text.append(piece, static_cast<size_t>(size));
  }
  ::close(follower);
  ::close(leader);
  return text;
}

TEST(Progress, PrintsAfterASecondAndErasesItself) {
  const std::string text = on_terminal(std::chrono::milliseconds(1050));
  if (text == "no terminal") GTEST_SKIP() << "no pseudo terminals here";
  EXPECT_NE(text.find("work  [####"), std::string::npos) << text;
  ASSERT_GE(text.size(), 4u);
  EXPECT_EQ(text.substr(text.size() - 4), "\r\x1b[K");
}

TEST(Progress, ShortWorkStaysSilent) {
  const std::string text = on_terminal(std::chrono::milliseconds(0));
  if (text == "no terminal") GTEST_SKIP() << "no pseudo terminals here";
  EXPECT_EQ(text, "");
}

TEST(Progress, SilentWithoutATerminal) {
  ::testing::internal::CaptureStderr();
  {
    Progress progress("work", 2);
    std::this_thread::sleep_for(std::chrono::milliseconds(1050));
    progress.add(2);
  }
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

}  // namespace
}  // namespace sikv
