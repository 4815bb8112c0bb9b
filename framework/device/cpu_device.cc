#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <thread>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/log.h"
#include "framework/base/text.h"
#include "framework/device/device.h"
#include "framework/device/worker_team.h"

namespace sikv {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

std::string processor_name() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "CPU";
}

uint64_t available_bytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string name, unit;
  for (uint64_t kib = 0; meminfo >> name >> kib >> unit;) {
    if (name == "MemAvailable:") return kib << 10;
  }
  return static_cast<uint64_t>(sysconf(_SC_AVPHYS_PAGES)) *
         static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(int threads) : team_(threads) {
    info_.struct_size = sizeof info_;
    info_.type = SIKV_CPU;
    info_.num_threads = threads;
    info_.memory_bytes = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
                         static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    std::snprintf(info_.name, sizeof info_.name, "%s", processor_name().c_str());
    host_ = {sizeof host_, 0, this, &CpuDevice::parallel_for, &CpuDevice::write_log};
  }

  void* allocate(size_t bytes) override {
    const size_t size = rounded(bytes);
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) {
      throw Error(
          "cannot reserve {} of memory: {} are free; lower the batch, the context or the number "
          "of layers",
          bytes_text(bytes), bytes_text(free_bytes()));
    }
    // Gathering tokens from a plane of gigabytes misses the TLB at every token with 4 KiB pages.
    if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);
    return data;
  }
  void release(void* data, size_t bytes) noexcept override { munmap(data, rounded(bytes)); }
  void discard(void* block, size_t block_bytes, size_t first, size_t bytes) noexcept override {
    const size_t begin = rounded(first), end = (first + bytes) / page() * page();
    if (begin >= end) return;
    // Else the kernel joins what is left into huge pages again, holes filled.
    if (block_bytes >= kHugePage) madvise(block, rounded(block_bytes), MADV_NOHUGEPAGE);
    madvise(static_cast<char*>(block) + begin, end - begin, MADV_DONTNEED);
  }
  void trim() noexcept override { malloc_trim(0); }
  void copy_in(void* to, const void* from, size_t bytes) override { copy(to, from, bytes); }
  void copy_out(void* to, const void* from, size_t bytes) override { copy(to, from, bytes); }
  uint64_t free_bytes() const override { return available_bytes(); }
  void mark(int i) override {
    const size_t n = static_cast<size_t>(i);
    if (n >= marks_.size()) marks_.resize(n + 1);
    marks_[n] = Clock::now();
  }
  double seconds(int from, int to) override {
    const auto at = [&](int i) { return marks_.at(static_cast<size_t>(i)); };
    return std::chrono::duration<double>(at(to) - at(from)).count();
  }

 private:
  using Clock = std::chrono::steady_clock;

  // memcpy takes no null pointer, which an empty vector may give.
  static void copy(void* to, const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  static size_t rounded(size_t bytes) { return (bytes + page() - 1) / page() * page(); }
  // Of the system, 4 KiB on most.
  static size_t page() {
    static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
  }

  static void write_log(void*, int32_t level, const char* text) {
    log().log(level == 0   ? spdlog::level::debug
              : level == 1 ? spdlog::level::info
                           : spdlog::level::warn,
              "{}", text);
  }

  static void parallel_for(void* context, int64_t n, void (*body)(void*, int64_t, int32_t),
                           void* arg) {
    static_cast<CpuDevice*>(context)->team_.run(n, body, arg);
  }

  std::vector<Clock::time_point> marks_;
  WorkerTeam team_;
};

}  // namespace

std::unique_ptr<Device::Recording> Device::record(const std::function<void()>&) {
  throw InternalError("only a GPU records work");
}

std::unique_ptr<Device> open_cpu_device(int threads) {
  if (threads == 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (threads < 1 || threads > 1024) {
    throw Error("threads is {}: give a number from 1 to 1024, or 0 for one per core", threads);
  }
  return std::make_unique<CpuDevice>(threads);
}

}  // namespace sikv
