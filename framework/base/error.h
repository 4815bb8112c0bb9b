// Two families of failure, told apart by type.
//
//   Error          the caller's fault: bad config, missing file, wrong shape, out of memory.
//                  what() is one sentence that names the offending value and the remedy.
//   InternalError  a bug in this library, thrown by SIKV_ASSERT with the expression and its place.
//
// Interrupted is neither: the user asked to stop. A library never prints and never exits; the
// command line turns each type into one line on stderr and the exit code given by kExitCode.
#ifndef SIKV_FRAMEWORK_BASE_ERROR_H_
#define SIKV_FRAMEWORK_BASE_ERROR_H_

#include <fmt/format.h>

#include <exception>
#include <stdexcept>
#include <utility>

namespace sikv {

class Error : public std::runtime_error {
 public:
  static constexpr int kExitCode = 2;

  // Text that was not written as a format string goes through Error("{}", text).
  template <typename... Args>
  explicit Error(fmt::format_string<Args...> format, Args&&... args)
      : std::runtime_error(fmt::format(format, std::forward<Args>(args)...)) {}
};

class InternalError : public std::logic_error {
 public:
  static constexpr int kExitCode = 70;

  using std::logic_error::logic_error;
};

class Interrupted : public std::exception {
 public:
  static constexpr int kExitCode = 130;

  const char* what() const noexcept override { return "interrupted"; }
};

namespace internal {
[[noreturn]] void assertion_failed(const char* expression, const char* file, int line);
}  // namespace internal

}  // namespace sikv

// Active in every build type: a wrong result costs more than a branch.
#define SIKV_ASSERT(expression) \
  ((expression) ? (void)0 : ::sikv::internal::assertion_failed(#expression, __FILE__, __LINE__))

#endif  // SIKV_FRAMEWORK_BASE_ERROR_H_
