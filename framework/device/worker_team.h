// Threads that share loops of microseconds.
//
// A decode step of a small model runs some 180 loops of 10 to 200 us. Waking a sleeping thread costs
// as much as such a loop, so helpers watch for the next one a while before they sleep: a step of
// SmolLM2-135M at 7.5K tokens on 2 cores took 8.0 ms so, and 10.4 ms with a pool that sleeps
// (scripts/bench_eval decode).
#ifndef SIKV_FRAMEWORK_DEVICE_WORKER_TEAM_H_
#define SIKV_FRAMEWORK_DEVICE_WORKER_TEAM_H_

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace sikv {

class WorkerTeam {
 public:
  using Body = void (*)(void* arg, int64_t i, int32_t worker);

  // The caller of run and num_workers - 1 (>= 0) threads.
  explicit WorkerTeam(int num_workers);
  ~WorkerTeam();
  WorkerTeam(const WorkerTeam&) = delete;
  WorkerTeam& operator=(const WorkerTeam&) = delete;

  // body(arg, i, worker) for i in [0, n), each once, with worker < min(num_workers, n); the caller is
  // worker 0. Returns when all are done. Helpers that have not begun when no index is left are not
  // waited for: on a busy machine their start alone can take milliseconds. The caller runs the loop
  // alone where it is at work in a loop of this team, as the worker it is there, and where the team
  // is at work for another thread, as worker 0.
  void run(int64_t n, Body body, void* arg);

 private:
  struct Loop {
    int64_t n = 0;
    Body body = nullptr;
    void* arg = nullptr;
    alignas(64) std::atomic<int64_t> next{0};
  };

  void help(int worker);
  void work(int worker);

  const int spins_;
  std::mutex callers_;
  Loop loop_;
  // Odd while loop_ is open. Who counts itself in before it is closed is waited for; who does so
  // later sees that it is closed and leaves it alone (both sequentially consistent).
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<int32_t> inside_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> helpers_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_DEVICE_WORKER_TEAM_H_
