#include "framework/base/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "framework/base/interrupt.h"
#include "framework/base/text.h"

namespace sikv {
namespace {

constexpr auto kFirstPrint = std::chrono::seconds(1);
constexpr auto kBetweenPrints = std::chrono::milliseconds(100);

int terminal_width() {
  struct winsize size = {};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string rate_text(double rate) {
  if (rate >= 1e9) return fmt::format("{:.1f}G/s", rate / 1e9);
  if (rate >= 1e6) return fmt::format("{:.1f}M/s", rate / 1e6);
  if (rate >= 1e3) return fmt::format("{:.1f}k/s", rate / 1e3);
  return fmt::format("{:.1f}/s", rate);
}

void print(const std::string& line) {
  std::fputs(fmt::format("\r\x1b[K{}", line).c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace

std::string progress_line(const std::string& label, int64_t done, int64_t total, double seconds,
                          int width) {
  constexpr int kCells = 20;
  const double share =
      total > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0) : 1;
  const double rate = seconds > 0 ? static_cast<double>(done) / seconds : 0;
  const int filled = static_cast<int>(share * kCells);
  std::string line = fmt::format("{}  [{}{}] {:3.0f} %  {}", label, std::string(filled, '#'),
                                 std::string(kCells - filled, ' '), share * 100, rate_text(rate));
  if (rate > 0 && done < total) {
    line += fmt::format("  {} left", duration_text(static_cast<double>(total - done) / rate));
  }
  // A line that wraps could not be erased.
  if (static_cast<int>(line.size()) >= width) line.resize(std::max(width - 1, 0));
  return line;
}

Progress::Progress(std::string label, int64_t total)
    : label_(std::move(label)),
      total_(total),
      next_print_(start_ + kFirstPrint),
      terminal_(::isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (printed_) print("");
}

void Progress::add(int64_t n) {
  check_interrupt();
  done_ += n;
  if (!terminal_) return;
  const Clock::time_point now = Clock::now();
  if (now < next_print_) return;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  print(progress_line(label_, done_, total_, seconds, terminal_width()));
  printed_ = true;
  next_print_ = now + kBetweenPrints;
}

}  // namespace sikv
