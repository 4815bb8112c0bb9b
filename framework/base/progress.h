// One line on stderr for work that takes longer than a second:
//   reading layers  [#########           ]  46 %  12.3/s  7.00 s left
// Nothing is printed when stderr is not a terminal, and nothing remains when the work ends.
#ifndef SIKV_FRAMEWORK_BASE_PROGRESS_H_
#define SIKV_FRAMEWORK_BASE_PROGRESS_H_

#include <chrono>
#include <cstdint>
#include <string>

namespace sikv {

class Progress {
 public:
  Progress(std::string label, int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Counts n more done; throws Interrupted after Ctrl-C. For one thread.
  void add(int64_t n = 1);

 private:
  using Clock = std::chrono::steady_clock;

  std::string label_;
  int64_t total_;
  int64_t done_ = 0;
  Clock::time_point start_ = Clock::now();
  Clock::time_point next_print_;
  bool terminal_;
  bool printed_ = false;
};

// The line after `seconds`, at most `width` columns.
std::string progress_line(const std::string& label, int64_t done, int64_t total, double seconds,
                          int width);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_BASE_PROGRESS_H_
