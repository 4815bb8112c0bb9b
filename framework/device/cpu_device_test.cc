#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "framework/base/error.h"
#include "framework/device/device.h"

namespace sikv {
namespace {

TEST(CpuDevice, ParallelForVisitsEveryIndexOnce) {
  for (int threads : {1, 2, 5}) {
    const auto device = open_cpu_device(threads);
    for (int64_t n : {0, 1, 2, 3, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
      struct Arg {
        std::vector<std::atomic<int>>& seen;
        int threads;
      } arg{seen, threads};
      device->host().parallel_for(
          device->host().context, n,
          [](void* p, int64_t i, int32_t worker) {
            auto& arg = *static_cast<Arg*>(p);
            ASSERT_LT(worker, arg.threads);
            ++arg.seen[static_cast<size_t>(i)];
          },
          &arg);
      for (const auto& count : seen) EXPECT_EQ(count, 1);
    }
  }
}

TEST(CpuDevice, NestedParallelForRunsOnTheSameWorker) {
  const auto device = open_cpu_device(3);
  struct Arg {
    const sikv_host& host;
    std::atomic<int> inner{0};
  } arg{device->host()};
  device->host().parallel_for(
      device->host().context, 8,
      [](void* p, int64_t, int32_t outer) {
        auto& arg = *static_cast<Arg*>(p);
        struct Inner {
          Arg& arg;
          int outer;
        } inner{arg, outer};
        arg.host.parallel_for(
            arg.host.context, 4,
            [](void* q, int64_t, int32_t worker) {
              auto& inner = *static_cast<Inner*>(q);
              EXPECT_EQ(worker, inner.outer);
              ++inner.arg.inner;
            },
            &inner);
      },
      &arg);
  EXPECT_EQ(arg.inner, 32);
}

TEST(CpuDevice, RefusesThreadCountsOutOfRange) {
  EXPECT_THROW(open_cpu_device(-1), Error);
  EXPECT_THROW(open_cpu_device(5000), Error);
}

TEST(CpuDevice, MemoryIsZeroedAndAligned) {
  const auto device = open_cpu_device(1);
  DeviceBuffer buffer(*device, 10000);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.as<>()) % 64, 0u);
  const auto* bytes = buffer.as<unsigned char>();
  EXPECT_EQ(std::accumulate(bytes, bytes + 10000, 0), 0);
}

}  // namespace
}  // namespace sikv
