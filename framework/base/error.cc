#include "framework/base/error.h"

namespace sikv::internal {

void assertion_failed(const char* expression, const char* file, int line) {
  throw InternalError(fmt::format("internal error: {} does not hold at {}:{}; please report this",
                                  expression, file, line));
}

}  // namespace sikv::internal
