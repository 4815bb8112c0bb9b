// How often a selection was taken over and what that took, as counters.
#ifndef SIKV_KERNELS_COMMON_SHARING_COUNTS_H_
#define SIKV_KERNELS_COMMON_SHARING_COUNTS_H_

#include <chrono>
#include <span>

#include "kernels/common/index_sharing.h"

namespace sikv {

using CountClock = std::chrono::steady_clock;

inline double seconds_since(CountClock::time_point start) {
  return std::chrono::duration<double>(CountClock::now() - start).count();
}

// Of one worker, on cache lines of its own.
struct alignas(64) SharingCounts {
  double searched = 0, reused = 0;      // runs that looked for tokens; that took a list over
  double search_s = 0, reuse_s = 0;     // the workers' time in them
  double selected = 0, scan_bytes = 0;  // slots selected; bytes read to decide
  SharingAudit audit;

  double runs() const { return searched + reused; }
  void ran(bool shared, double seconds) {
    (shared ? reused : searched) += 1;
    (shared ? reuse_s : search_s) += seconds;
  }
  void add(const SharingCounts& other) {
    searched += other.searched;
    reused += other.reused;
    search_s += other.search_s;
    reuse_s += other.reuse_s;
    selected += other.selected;
    scan_bytes += other.scan_bytes;
    audit.add(other.audit);
  }
  // `runs` and `scan_bytes` are the caller's to push.
  template <typename Push>
  void push(const Push& push, bool audited) const {
    push("reused", reused);
    push("selected", selected);
    push("search_s", search_s);
    push("reuse_s", reuse_s);
    if (!audited) return;
    push("audited", audit.rows);
    push("dropped", audit.dropped);
    push("dropped_bound", audit.dropped_bound);
    push("loss", audit.loss);
    push("loss_bound", audit.loss_bound);
    push("bound_violations", audit.violations);
  }
};

// Of all workers.
inline SharingCounts sum_of(std::span<const SharingCounts> workers) {
  SharingCounts sum;
  for (const SharingCounts& counts : workers) sum.add(counts);
  return sum;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SHARING_COUNTS_H_
