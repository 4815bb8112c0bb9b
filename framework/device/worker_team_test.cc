#include "framework/device/worker_team.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <numeric>

namespace sikv {
namespace {

template <typename Body>
void run(WorkerTeam& team, int64_t n, Body body) {
  team.run(
      n, [](void* arg, int64_t i, int32_t worker) { (*static_cast<Body*>(arg))(i, worker); },
      &body);
}

// Loops follow each other faster than helpers come and go, so that they meet them at every point.
TEST(WorkerTeam, ManyShortLoopsLoseNothing) {
  for (int workers : {1, 2, 3, 8}) {
    WorkerTeam team(workers);
    std::vector<int> visits(7);
    for (int loop = 0; loop < 20000; ++loop) {
      const int64_t n = loop % 8;
      run(team, n, [&](int64_t i, int32_t worker) {
        ASSERT_LT(worker, std::min<int64_t>(workers, n));
        ++visits[static_cast<size_t>(i)];  // of one worker at a time: a race is TSan's to find
      });
    }
    EXPECT_EQ(std::accumulate(visits.begin(), visits.end(), 0), 20000 / 8 * 28);
  }
}

TEST(WorkerTeam, HelpersThatSleepAreWoken) {
  WorkerTeam team(2);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  std::atomic<bool> helped = false;
  run(team, 2, [&](int64_t i, int32_t worker) {
    if (worker == 1) helped = true;
    // The caller, who gets one of the two indices at most while it waits here, leaves one.
    if (i == 0 && worker == 0) {
      while (!helped) std::this_thread::yield();
    }
  });
  EXPECT_TRUE(helped);
}

// A thread is a worker of the team that it works for, and a caller of all others.
TEST(WorkerTeam, LoopsInLoopsKeepTheirWorkers) {
  WorkerTeam large(8), small(2);
  std::atomic<int> bodies = 0;
  run(large, 64, [&](int64_t, int32_t outer) {
    run(large, 3, [&](int64_t, int32_t worker) { EXPECT_EQ(worker, outer); });
    run(small, 4, [&](int64_t, int32_t worker) {
      EXPECT_LT(worker, 2);
      ++bodies;
    });
    run(large, 2, [&](int64_t, int32_t worker) { EXPECT_EQ(worker, outer); });
  });
  EXPECT_EQ(bodies, 64 * 4);
}

TEST(WorkerTeam, CallersAtOnceEachGetTheirLoopDone) {
  WorkerTeam team(2);
  std::atomic<int64_t> sum = 0;
  const auto call = [&] {
    for (int loop = 0; loop < 2000; ++loop) {
      run(team, 5, [&](int64_t i, int32_t) { sum += i; });
    }
  };
  std::thread other(call);
  call();
  other.join();
  EXPECT_EQ(sum, 2 * 2000 * 10);
}

}  // namespace
}  // namespace sikv
