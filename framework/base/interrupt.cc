#include "framework/base/interrupt.h"

#include <atomic>
#include <csignal>

#include "framework/base/error.h"

namespace sikv {
namespace {

std::atomic<bool> flag{false};
static_assert(std::atomic<bool>::is_always_lock_free, "only these may be used in a signal handler");

extern "C" void on_signal(int signal) {
  if (flag.exchange(true)) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

}  // namespace

void install_interrupt_handler() {
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;  // system calls inside libraries must not fail half way
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool interrupted() { return flag.load(std::memory_order_relaxed); }

void check_interrupt() {
  if (interrupted()) throw Interrupted();
}

}  // namespace sikv
