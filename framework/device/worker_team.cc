#include "framework/device/worker_team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <utility>

namespace sikv {
namespace {

// About 100 us of watching: longer than what a step computes between two loops.
constexpr int kSpins = 2500;

// The loop that a thread is at work in.
struct Place {
  const void* team = nullptr;
  int worker = 0;
};
thread_local Place place;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Until `value` is no longer `old`.
template <typename T>
void await_change(const std::atomic<T>& value, T old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load() != old) return;
    relax();
  }
  value.wait(old);
}

// More threads than processors: who watches takes time from who works.
int spins_of(int num_workers) {
  return num_workers <= static_cast<int>(std::thread::hardware_concurrency()) ? kSpins : 0;
}

}  // namespace

WorkerTeam::WorkerTeam(int num_workers) : spins_(spins_of(num_workers)) {
  for (int worker = 1; worker < num_workers; ++worker) {
    helpers_.emplace_back([this, worker] { help(worker); });
  }
}

WorkerTeam::~WorkerTeam() {
  stop_ = true;
  state_ += 2;
  state_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void WorkerTeam::run(int64_t n, Body body, void* arg) {
  std::unique_lock lock(callers_, std::defer_lock);
  const bool inside = place.team == this;
  if (inside || helpers_.empty() || n <= 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < n; ++i) body(arg, i, inside ? place.worker : 0);
    return;
  }
  loop_.n = n;
  loop_.body = body;
  loop_.arg = arg;
  loop_.next = 0;
  ++state_;
  state_.notify_all();
  work(0);
  ++state_;
  for (int32_t inside = inside_; inside != 0; inside = inside_) {
    await_change(inside_, inside, spins_);
  }
}

void WorkerTeam::help(int worker) {
  for (uint32_t seen = 0; !stop_;) {
    await_change(state_, seen, spins_);
    seen = state_;
    if (seen % 2 == 0) continue;
    ++inside_;
    if (state_ == seen && worker < loop_.n) work(worker);
    if (--inside_ == 0) inside_.notify_one();
  }
}

void WorkerTeam::work(int worker) {
  const Place before = std::exchange(place, {this, worker});
  for (int64_t i = loop_.next++; i < loop_.n; i = loop_.next++) loop_.body(loop_.arg, i, worker);
  place = before;
}

}  // namespace sikv
